"""Convert foreign files (`convert`, with `readers`) and run language models (`extract`), in worker processes or on Ray."""
