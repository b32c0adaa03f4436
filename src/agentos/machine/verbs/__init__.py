"""The verbs of a VM, a module for each family: `VM` inherits them all."""
