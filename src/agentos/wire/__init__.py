"""The RivetKit client protocol without I/O, for the server and the Python client alike.

Nothing here opens a socket or waits: bytes come in, typed values come out, and the other way round.
"""
