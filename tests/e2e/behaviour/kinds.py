"""The registry that `agentos serve kinds:registry` serves to the behaviours."""

from surfaces import KINDS

from agentos import agent_os, setup

registry = setup(use={name: agent_os(**options) for name, options in KINDS.items()})
