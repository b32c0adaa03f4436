"""One VM: its plan, its processes inside and the handles on them outside."""
