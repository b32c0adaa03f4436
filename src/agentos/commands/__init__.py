"""The commands of `agentos`, one module each: `add_parser` declares it, `run` does it."""
