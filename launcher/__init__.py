"""The VM side of a pod: hands the pod's address to a virtual machine."""
