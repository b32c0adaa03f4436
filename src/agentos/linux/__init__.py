"""What the kernel can do: thin, synchronous, without policy. Imports nothing else of agentos."""
