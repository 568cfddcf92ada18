"""A double of kube-apiserver for nodes and pods: an HTTPS server in a process of its own.

    with KubeServer(tmp_path / "kube") as kube:                  # loopback; KubeServer(dir, lab) in a lab
        kube.control.add_node("node1", "10.244.1.0/24", address="192.168.77.11")
        kube.control.fill(5000, fat=True)                        # peers that do not exist
        run("flanneld", f"--kubeconfig-file={kube.kubeconfig}")  # or in-cluster: kube.service_account,
                                                                 # kube.environment
        kube.control.stall("watch"); ...; kube.control.clear()
        assert kube.control.counts()["list nodes"] == 1
        kube.kill(); kube.start(); kube.start(lose_data=True); kube.pause(); kube.resume()

`control.py` has all of it: `KubeServer` is the process, `Control` the channel (a unix socket in the
directory, which no client of the API can mistake for the API). The directory holds `kubeconfig` and
`serviceaccount/` (ca.crt, token, namespace: flannel's account, with the rights of its ClusterRole),
`admin.kubeconfig` (all rights, for kubectl), `ca.crt`, `url`, and the objects in `objects.journal`.

Faithful to kube-apiserver 1.33 in

- authentication by bearer token (as with --anonymous-auth=false) and RBAC, with the texts of 401 and 403;
- get, list, watch, create, update, patch, delete of nodes, nodes/status, pods and pods/status; 404, 405,
  406, 409, 410, 415, 422, 504 as `Status` objects;
- versions: one counter for all; optimistic locking; a write that changes nothing makes no version and no
  event; podCIDRs of a node can be set once;
- lists: limit and continue over the state of the first page, 410 with a new token when history is gone,
  limit ignored for resourceVersion=0, Exact and NotOlderThan, label and field selectors, Table and
  PartialObjectMetadata(List), gzip above 128 KiB, chunks above 2 kB, items without kind and apiVersion;
- watches: initial state for no version or 0, sendInitialEvents, bookmarks every minute and before the end,
  an ERROR event for an old version, silence for a version of the future (data was lost), an end in order
  after timeoutSeconds or 30 to 60 minutes, an end for a client that does not read;
- strategic merge with $patch, $setElementOrder, $retainKeys and $deleteFromPrimitiveList, conditions and
  addresses merged by type, taints replaced; merge patch; JSON patch;
- field order, omitted and null fields and escapes of the JSON.

Not faithful: HTTP/2, protobuf, CBOR, YAML, websockets and server-side apply are not spoken (a client that
offers JSON too is served); managedFields are not kept; unknown fields are dropped without a Warning header;
dryRun, deletecollection and graceful deletion do not exist; there are no controllers and no admission
plugins (a created node gets no taint); of pods only metadata is validated. History and the versions of
half-read lists end with the process, where upstream still finds them in etcd for some minutes. Both list
and watch live from one history, counted in events (`window`); upstream compacts etcd every five minutes and
keeps a watch cache besides. A too large version is refused at once, not after 3 s.
"""
