"""The second half of low-rank updates of many adapters: low-rank activations times B, added to a frozen product."""
