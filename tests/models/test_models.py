from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data

from models import GNNLSTMDetector, GVAELSTMDetector, LSTMDetector
from models.gnn_lstm import to_steps


def graphs_of(counts: list[int], *, seed: int = 0, edge_features: int | None = 1) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Records with `counts` graphs each."""
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for _ in range(sum(counts)):
        nodes = int(torch.randint(1, 6, (), generator=generator))
        edges = int(torch.randint(0, 8, (), generator=generator))
        attr = None if edge_features is None else torch.rand(edges, generator=generator)
        edge_index = torch.randint(0, nodes, (2, edges), generator=generator)
        graphs.append(Data(x=torch.randn(nodes, 6, generator=generator), edge_index=edge_index, edge_attr=attr))
    batch = Batch.from_data_list(graphs)
    return batch, torch.tensor(counts), batch.ptr[1:] - 1


@pytest.mark.parametrize(("classes", "outputs"), [(2, 1), (3, 3)])
def test_heads_fit_the_number_of_classes(classes: int, outputs: int) -> None:
    logits, penalty = LSTMDetector(5, classes)(torch.randn(4, 7, 5), torch.full((4,), 7))
    assert logits.shape == (4, outputs)
    assert penalty.tolist() == [0] * 4
    for model in (GNNLSTMDetector(6, classes), GVAELSTMDetector(6, classes)):
        logits, penalty = model(*graphs_of([2, 3]))
        assert logits.shape == (2, outputs)
        assert penalty.shape == (2,)


def test_padding_does_not_reach_a_sequence() -> None:
    torch.manual_seed(0)
    model = LSTMDetector(5).eval()
    sequences = torch.randn(3, 6, 5)
    lengths = torch.tensor([6, 2, 4])
    together = model(sequences, lengths).logits_BK
    sequences[1, 2:] = 1e3
    assert torch.equal(model(sequences, lengths).logits_BK, together)
    for row in range(3):
        alone = model(sequences[row : row + 1, : lengths[row]], lengths[row : row + 1]).logits_BK
        assert torch.allclose(alone[0], together[row], atol=1e-6)


@pytest.mark.parametrize("make", [GNNLSTMDetector, GVAELSTMDetector])
def test_a_record_does_not_depend_on_its_batch(make: Any) -> None:
    """No normalisation over the batch: each record alone gives what it gives among others, so processes agree."""
    torch.manual_seed(0)
    model = make(6).eval()
    counts = [2, 1, 3]
    batch, per_record, last = graphs_of(counts)
    together = model(batch, per_record, last)
    graphs = batch.to_data_list()
    for row, (begin, count) in enumerate(zip([0, 2, 3], counts, strict=True)):
        one = Batch.from_data_list(graphs[begin : begin + count])
        alone = model(one, torch.tensor([count]), one.ptr[1:] - 1)
        assert torch.allclose(alone.logits_BK[0], together.logits_BK[row], atol=1e-5)
        assert torch.allclose(alone.penalty_B[0], together.penalty_B[row], atol=1e-5)


@pytest.mark.parametrize("make", [GNNLSTMDetector, GVAELSTMDetector])
def test_structure_matters_to_graph_models(make: Any) -> None:
    torch.manual_seed(0)
    model = make(6).eval()
    batch, per_record, last = graphs_of([3, 3])
    before = model(batch, per_record, last).logits_BK
    batch.edge_attr = batch.edge_attr + 1
    assert not torch.allclose(model(batch, per_record, last).logits_BK, before)


def test_edge_features_of_any_width_or_none() -> None:
    batch, per_record, last = graphs_of([2, 2], edge_features=None)
    assert GNNLSTMDetector(6)(batch, per_record, last).logits_BK.shape == (2, 1)
    batch.edge_attr = torch.rand(batch.edge_index.shape[1], 4)
    assert GVAELSTMDetector(6, edge_features=4)(batch, per_record, last).logits_BK.shape == (2, 1)


def test_sampling_is_in_training_alone() -> None:
    torch.manual_seed(0)
    model = GVAELSTMDetector(6, dropout=0.0)
    inputs = graphs_of([2, 2])
    one, other = model(*inputs), model(*inputs)
    assert torch.equal(one.logits_BK, other.logits_BK)
    assert not torch.equal(one.penalty_B, other.penalty_B)
    model.eval()
    assert torch.equal(model(*inputs).penalty_B, model(*inputs).penalty_B)
    assert float(one.penalty_B.detach().min()) > 0


def test_graphs_become_steps_in_order() -> None:
    values = torch.arange(6.0).reshape(6, 1)
    steps, lengths = to_steps(values, torch.tensor([1, 3, 2]))
    assert steps[..., 0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 0]]
    assert lengths.tolist() == [1, 3, 2]


@pytest.mark.parametrize("make", [LSTMDetector, GNNLSTMDetector, GVAELSTMDetector])
def test_every_weight_learns(make: Any) -> None:
    torch.manual_seed(0)
    model = make(6)
    inputs = (torch.randn(8, 5, 6), torch.full((8,), 5)) if make is LSTMDetector else graphs_of([2] * 8)
    output = model(*inputs)
    (output.logits_BK.square().sum() + output.penalty_B.sum()).backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum() > 0]
    assert missing == []
