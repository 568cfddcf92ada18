"""The node daemon flanneld and the operator's tool flannelctl."""
