"""The server: one ASGI application with a management API, a gateway to the VMs' actions, and their events."""
