"""extract on models of all kinds: hybrid ones, ones without attention, of several widths, with few positions; long prompts."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dali_pipeline as dp
from dali_pipeline.ingest.extract import extract as extract_module
from dali_pipeline.ingest.extract.anatomy import examine
from dali_pipeline.ingest.extract.extract import extract
from dali_pipeline.ingest.extract.prompts import Prompt, read_prompts
from dali_pipeline.ingest.extract.tracer import ExtractConfig, forget_model, load_model, load_tokenizer, tokens_of
from dali_pipeline.ingest.readers.traces import read_scores
from tests.helpers.languagemodels import CONFIG, WORDS, make_model, write_prompts

SMALL: dict[str, Any] = {"vocab_size": len(WORDS) + 1, "hidden_size": 16, "intermediate_size": 32}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
# by name: the configuration, and the blocks that have attention
HYBRID: dict[str, tuple[dict[str, Any], list[int]]] = {
    "Jamba": (
        {**SMALL, **HEADS, "num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2,
         "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
        [2, 5],
    ),
    "Qwen3Next": (
        {**SMALL, **HEADS, "num_hidden_layers": 4, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
         "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"]},
        [2, 4],
    ),
    "Lfm2": ({**SMALL, **HEADS, "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}, [3]),
    "Bamba": (
        {**SMALL, **HEADS, "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8,
         "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2},
        [2],
    ),
    "Llama": ({**SMALL, **HEADS, "num_hidden_layers": 3}, [1, 2, 3]),
    "GPT2": ({"vocab_size": len(WORDS) + 1, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}, [1, 2, 3]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget_model()


def save(folder: Path, name: str, settings: dict[str, Any]) -> str:
    """A model of random weights with the tokenizer of test_extract."""
    make_model(folder)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    getattr(
        transformers, "MambaForCausalLM" if name == "Mamba" else f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel"
    )(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", list(HYBRID))
def test_each_block_has_its_own_attention(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    settings, having = HYBRID[name]
    model = save(tmp_path / "model", name, settings)
    _, base, device = load_model(model, "cpu")
    anatomy = examine(base, device)
    assert list(anatomy.attention) == having
    owners: dict[int, torch.Tensor] = {}  # by block, what its own modules give

    def note(block: int) -> Any:
        def hook(_: object, __: object, output: Any) -> None:
            for one in output if isinstance(output, tuple) else ():
                if isinstance(one, torch.Tensor) and one.ndim == 4 and one.shape[-2:] == (7, 7):
                    owners[block] = one

        return hook

    for path, module in base.named_modules():
        if parts := [int(part) for part in path.split(".") if part.isdecimal()]:
            module.register_forward_hook(note(parts[0] + 1))
    tokens = torch.arange(7)[None] % len(WORDS)
    with torch.inference_mode():
        out = base(input_ids=tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    for block, place in anatomy.attention.items():
        assert out.attentions[place] is owners[block]
    data = extract(model, write_prompts(tmp_path / "prompts.csv", 6), tmp_path / "set", CONFIG, device="cpu")
    assert data.layer_numbers("graphs") == having
    blocks = len(base.config.get_text_config().layer_types) if name == "Qwen3Next" else len(anatomy.widths) - 1
    assert data.layer_numbers("sequences") == list(range(1, blocks + 1))
    told = f"graphs are made of the blocks that have attention: {', '.join(map(str, having))}"
    assert (told in caplog.text) == (len(having) < blocks)
    if len(having) < blocks:
        without = next(block for block in range(1, blocks + 1) if block not in having)
        config = ExtractConfig(graph_layers=(having[0], without))
        with pytest.raises(
            dp.UsageError, match=rf"^block {without} of .* has no attention .*; blocks that have some: {having[0]}"
        ):
            extract(model, tmp_path / "prompts.csv", tmp_path / "other", config, device="cpu")
        assert not (tmp_path / "other").exists()


def test_a_model_without_attention_gives_sequences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"vocab_size": len(WORDS) + 1, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "use_mambapy": False}
    model = save(tmp_path / "model", "Mamba", settings)
    prompts = write_prompts(tmp_path / "prompts.csv", 6)
    data = extract(model, prompts, tmp_path / "set", CONFIG, device="cpu")
    assert data.schema.kinds == ("sequences",)
    assert "graphs are made of the blocks that have attention: none" in caplog.text
    with pytest.raises(dp.UsageError, match=r"^block 2 of .* has no attention .*: none$"):
        extract(model, prompts, tmp_path / "other", ExtractConfig(graph_layers=(2,)), device="cpu")


def test_hidden_states_of_two_widths_are_told_apart(tmp_path: Path) -> None:
    settings = {
        "vocab_size": len(WORDS) + 1,
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "ffn_dim": 16,
        "num_hidden_layers": 2,
    }
    model = save(
        tmp_path / "model",
        "OPT",
        {**settings, "num_attention_heads": 2, "do_layer_norm_before": True, "max_position_embeddings": 40},
    )
    prompts = write_prompts(tmp_path / "prompts.csv", 6)
    widths = examine(*load_model(model, "cpu")[1:]).widths
    assert set(widths) == {8, 16}
    odd = next(layer for layer in range(1, 3) if widths[layer] != widths[1])
    with pytest.raises(
        dp.UsageError, match=rf"hidden state {odd} has {widths[odd]} numbers, and 1 has {widths[1]}; expected one width"
    ):
        extract(model, prompts, tmp_path / "set", CONFIG, device="cpu")
    config = ExtractConfig(layers=(odd,), graph_layers=(), split=CONFIG.split)
    data = extract(model, prompts, tmp_path / "set", config, device="cpu")
    assert data.schema.sequence == dp.Field(dtype="float16", shape=(widths[odd],))


def test_prompts_beyond_the_models_positions_are_named_or_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save(tmp_path / "model", "GPT2", HYBRID["GPT2"][0])
    long = " ".join(WORDS[at % len(WORDS)] for at in range(50))
    (tmp_path / "p.csv").write_text(f"id,prompt,label\na,what is,0\nb,{long},1\nc,{' '.join(long.split()[-32:])},1\n")
    with pytest.raises(dp.UsageError, match=r"p\.csv: prompt 'b' has 50 tokens, and the model 32 positions; .*--truncate"):
        extract(model, tmp_path / "p.csv", tmp_path / "set", CONFIG, device="cpu")
    assert not (tmp_path / "set").exists()
    config = ExtractConfig(truncate=True, split=CONFIG.split)
    data = extract(model, tmp_path / "p.csv", tmp_path / "set", config, device="cpu")
    assert "1 of 3 prompts are cut to the last 32 tokens" in caplog.text
    (batch,) = dp.SequenceLoader(data, engine="torch", shuffle=False, batch_size=3)
    assert torch.allclose(batch.sequences[1], batch.sequences[2], atol=2e-3)
    assert not torch.allclose(batch.sequences[0], batch.sequences[2], atol=2e-3)


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "mps", "nonsense"])
def test_devices_that_are_not_there(tmp_path: Path, device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    model = save(tmp_path / "model", "Llama", HYBRID["Llama"][0])
    with pytest.raises(dp.UsageError, match=rf"^device is '{device}'"):
        extract(model, write_prompts(tmp_path / "prompts.csv", 3), tmp_path / "set", CONFIG, device=device)
    assert not (tmp_path / "set").exists()


def test_the_anatomy_of_a_model_that_is_elsewhere_is_that_of_its_configuration(tmp_path: Path) -> None:
    for name in ("Llama", "Lfm2"):
        settings, having = HYBRID[name]
        config = getattr(transformers, f"{name}Config")(**settings)
        assert list(extract_module._anatomy(config).attention) == having


def test_prompts_and_scores_of_any_length(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "p.csv").write_text(f"prompt,label\n{'a ' * 200_000},1\n")
    (prompt,) = read_prompts(tmp_path / "p.csv")
    assert len(prompt.text) == 400_000
    (tmp_path / "s.csv").write_text(f"question_id,score,note\n{'q' * 200_000},0.5,x\n")
    assert list(read_scores(tmp_path / "s.csv", "score").values()) == [0.5]
    assert csv.field_size_limit() == before


def test_a_special_token_at_the_begin_is_not_cut(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    model = save(tmp_path / "model", "GPT2", HYBRID["GPT2"][0])
    tokenizer = load_tokenizer(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="? $A", special_tokens=[("?", 0)])
    prompt = Prompt(id="a", group="a", text=" ".join(WORDS), label=0)
    assert tokens_of(tokenizer, [prompt]) == [[0, *range(1, len(WORDS) + 1)]]
    assert tokens_of(tokenizer, [prompt], 4) == [[0, *range(len(WORDS) - 2, len(WORDS) + 1)]]
