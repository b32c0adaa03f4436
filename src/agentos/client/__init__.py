"""The remote client: the verbs of a VM, asked of a server. `aio` is the asynchronous one, `sync` its blocking twin."""
