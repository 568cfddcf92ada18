"""The API double's patches and shapes against the rules of Kubernetes and of the RFCs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kube.objects import fat_node, node, peers
from tests.kube.patch import BadPatch, json_patch, merge, strategic
from tests.kube.schema import NODE, WrongType, decode, encode

Json = dict[str, Any]


def conditions(*types: str, status: str = "True") -> list[Json]:
    return [{"type": each, "status": status} for each in types]


def patched_status(original: Json, patch: Json) -> Any:
    return strategic({"status": original}, {"status": patch}, NODE)["status"]


def test_annotations_merge_and_null_removes_one() -> None:
    before = {"metadata": {"annotations": {"a": "1", "b": "2"}}}
    patch = {"metadata": {"annotations": {"b": None, "c": "3", "never-there": None}}}
    assert strategic(before, patch, NODE) == {"metadata": {"annotations": {"a": "1", "c": "3"}}}
    assert before == {"metadata": {"annotations": {"a": "1", "b": "2"}}}


def test_a_null_in_a_new_map_is_no_entry() -> None:
    patch = {"metadata": {"annotations": {"a": "1", "b": None}}}
    assert strategic({}, patch, NODE) == {"metadata": {"annotations": {"a": "1"}}}


def test_a_condition_is_merged_by_type_and_keeps_its_other_fields() -> None:
    before = {"conditions": [{"type": "Ready", "status": "True", "reason": "R"}, *conditions("DiskPressure")]}
    after = patched_status(before, {"conditions": [{"type": "Ready", "status": "False"}]})
    assert after["conditions"][0] == {"type": "Ready", "status": "False", "reason": "R"}
    assert [each["type"] for each in after["conditions"]] == ["Ready", "DiskPressure"]


def test_a_condition_that_a_patch_adds_is_the_first() -> None:
    """As on every node that runs flannel: NetworkUnavailable in front of what the kubelet wrote."""
    before = {"conditions": conditions("MemoryPressure", "Ready")}
    after = patched_status(before, {"conditions": conditions("NetworkUnavailable")})
    assert [each["type"] for each in after["conditions"]] == ["NetworkUnavailable", "MemoryPressure", "Ready"]


def test_set_element_order_rules_the_order() -> None:
    before = {"conditions": conditions("A", "B", "C")}
    patch = {
        "$setElementOrder/conditions": [{"type": "C"}, {"type": "B"}, {"type": "A"}],
        "conditions": conditions("B", status="False"),
    }
    after = patched_status(before, patch)["conditions"]
    assert [(each["type"], each["status"]) for each in after] == [
        ("C", "True"),
        ("B", "False"),
        ("A", "True"),
    ]


def test_two_addresses_of_one_type_are_one_to_a_patch() -> None:
    """Upstream's known weakness: the merge key is `type` though it is not unique."""
    before = {"addresses": [{"type": "InternalIP", "address": "1"}, {"type": "InternalIP", "address": "2"}]}
    after = patched_status(before, {"addresses": [{"type": "InternalIP", "address": "3"}]})
    assert [each["address"] for each in after["addresses"]] == ["3", "2"]


def test_taints_and_images_are_replaced() -> None:
    before = {
        "spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]},
        "status": {"images": [{"names": ["x"]}]},
    }
    patch = {"spec": {"taints": [{"key": "b", "effect": "NoExecute"}]}, "status": {"images": []}}
    assert strategic(before, patch, NODE) == patch


def test_pod_cidrs_and_finalizers_are_merged_as_sets() -> None:
    before = {"spec": {"podCIDRs": ["10.0.0.0/24"]}, "metadata": {"finalizers": ["a", "b"]}}
    patch = {"spec": {"podCIDRs": ["fd00::/64"]}, "metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]}}
    after = strategic(before, patch, NODE)
    assert sorted(after["spec"]["podCIDRs"]) == ["10.0.0.0/24", "fd00::/64"]
    assert after["metadata"]["finalizers"] == ["b"]


def test_directives() -> None:
    before = {"conditions": conditions("A", "B"), "capacity": {"cpu": "1", "pods": "2"}}
    assert patched_status(before, {"conditions": [{"$patch": "delete", "type": "A"}]})[
        "conditions"
    ] == conditions("B")
    replaced = patched_status(before, {"conditions": [{"$patch": "replace"}, *conditions("C")]})
    assert replaced["conditions"] == conditions("C")
    assert patched_status(before, {"capacity": {"$patch": "replace", "cpu": "3"}})["capacity"] == {"cpu": "3"}
    assert patched_status(before, {"capacity": {"$patch": "delete"}})["capacity"] == {}
    assert patched_status(before, {"capacity": {"$retainKeys": ["pods"], "pods": "4"}})["capacity"] == {
        "pods": "4"
    }


@pytest.mark.parametrize(
    "patch",
    [
        {"conditions": [{"status": "True"}]},
        {"conditions": ["Ready"]},
        {"conditions": [{"type": "A", "$patch": "merge"}]},
        {"capacity": {"$patch": "nonsense"}},
        {"capacity": {"$retainKeys": "cpu"}},
        {"$setElementOrder/conditions": "A", "conditions": []},
        {"$setElementOrder/conditions": [{"type": []}], "conditions": []},
        {"$setElementOrder/conditions": ["A"]},
        {"$setElementOrder/capacity": {}},
        {"$deleteFromPrimitiveList/volumesInUse": "A"},
    ],
)
def test_patches_that_make_no_sense_are_refused(patch: Json) -> None:
    with pytest.raises(BadPatch):
        patched_status({"conditions": conditions("A"), "capacity": {"cpu": "1"}}, patch)


names = st.sampled_from(["a", "b", "c"])
status_patches = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {"annotations": st.dictionaries(names, st.one_of(st.none(), st.text(max_size=3)))}
        ),
        "status": st.fixed_dictionaries(
            {"conditions": st.lists(names, unique=True).map(lambda types: conditions(*types, status="False"))}
        ),
    }
)


@given(st.dictionaries(names, st.text(max_size=3)), st.lists(names, unique=True), status_patches)
def test_a_patch_says_what_its_keys_shall_be_and_nothing_else(
    annotations: dict[str, str], types: list[str], patch: Json
) -> None:
    before = {"metadata": {"annotations": annotations}, "status": {"conditions": conditions(*types)}}
    after = strategic(before, patch, NODE)
    wanted = {**annotations, **patch["metadata"]["annotations"]}
    assert after["metadata"]["annotations"] == {
        key: value for key, value in wanted.items() if value is not None
    }
    states = {each: "True" for each in types} | {
        each["type"]: "False" for each in patch["status"]["conditions"]
    }
    assert {each["type"]: each["status"] for each in after["status"]["conditions"]} == states
    assert strategic(after, patch, NODE)["metadata"] == after["metadata"]


@pytest.mark.parametrize(
    ("original", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merge_patch_as_in_appendix_a_of_rfc_7396(original: Any, patch: Any, result: Any) -> None:
    assert merge(original, patch) == result


@pytest.mark.parametrize(
    ("operations", "result"),
    [
        ([{"op": "add", "path": "/b", "value": 1}], {"a": [1, 2], "b": 1}),
        ([{"op": "add", "path": "/a/1", "value": 9}], {"a": [1, 9, 2]}),
        ([{"op": "add", "path": "/a/-", "value": 9}], {"a": [1, 2, 9]}),
        ([{"op": "replace", "path": "/a/0", "value": 9}], {"a": [9, 2]}),
        ([{"op": "remove", "path": "/a/0"}], {"a": [2]}),
        ([{"op": "move", "from": "/a", "path": "/x~1y"}], {"x/y": [1, 2]}),
        ([{"op": "copy", "from": "/a/1", "path": "/b"}], {"a": [1, 2], "b": 2}),
        ([{"op": "test", "path": "/a/0", "value": 1}], {"a": [1, 2]}),
    ],
)
def test_json_patch(operations: Any, result: Any) -> None:
    assert json_patch({"a": [1, 2]}, operations) == result


@pytest.mark.parametrize(
    "operations",
    [
        [{"op": "test", "path": "/a/0", "value": 2}],
        [{"op": "remove", "path": "/missing"}],
        [{"op": "replace", "path": "/missing", "value": 1}],
        [{"op": "add", "path": "/a/7/b", "value": 1}],
        [{"op": "nonsense", "path": "/a"}],
        [{"path": "/a"}],
        [7],
        {"op": "add"},
    ],
)
def test_json_patch_that_does_not_apply(operations: Any) -> None:
    with pytest.raises(BadPatch):
        json_patch({"a": [1, 2]}, operations)


def test_an_object_is_written_as_go_writes_it() -> None:
    given = {
        "status": {"conditions": [{"status": "True", "type": "Ready", "nonsense": 1}], "images": []},
        "spec": {"unschedulable": False, "providerID": ""},
        "metadata": {"annotations": {"b": "<&>", "a": ""}, "name": "n", "uid": None},
        "unknown": {},
    }
    assert encode(decode(given, NODE)).decode() == (
        '{"metadata":{"name":"n","creationTimestamp":null,'
        '"annotations":{"a":"","b":"\\u003c\\u0026\\u003e"}},"spec":{},'
        '"status":{"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":null,'
        '"lastTransitionTime":null}],"daemonEndpoints":{"kubeletEndpoint":{"Port":0}},'
        '"nodeInfo":{"machineID":"","systemUUID":"","bootID":"","kernelVersion":"","osImage":"",'
        '"containerRuntimeVersion":"","kubeletVersion":"","kubeProxyVersion":"","operatingSystem":"",'
        '"architecture":""}}}'
    )


@pytest.mark.parametrize(
    "given",
    [
        {"metadata": {"annotations": {"a": 1}}},
        {"metadata": {"annotations": []}},
        {"metadata": "n"},
        {"spec": {"podCIDRs": "10.0.0.0/24"}},
        {"spec": {"unschedulable": "yes"}},
        {"status": {"conditions": [[]]}},
        {"status": {"images": [{"sizeBytes": True}]}},
        [],
    ],
)
def test_wrong_types_are_refused(given: Any) -> None:
    with pytest.raises(WrongType):
        decode(given, NODE)


@pytest.mark.parametrize(("fat", "bytes_wanted"), [(False, range(1300, 1700)), (True, range(14_000, 16_000))])
def test_peers_are_what_the_api_would_store(fat: bool, bytes_wanted: range) -> None:
    made = {name: data(7) for name, data in peers(3, fat, first=255)}
    assert list(made) == ["peer-00255", "peer-00256", "peer-00257"]
    for name, data in made.items():
        found = json.loads(data)
        assert encode(decode(found, NODE)) == data
        assert found["metadata"]["name"] == name
        assert found["metadata"]["resourceVersion"] == "7"
        assert len(data) in bytes_wanted
    spec = json.loads(made["peer-00256"])
    assert spec["spec"]["podCIDRs"] == ["10.1.0.0/24"]
    assert spec["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] == "172.16.1.1"
    data = spec["metadata"]["annotations"]["flannel.alpha.coreos.com/backend-data"]
    assert data == '{"VNI":1,"VtepMAC":"0a:00:00:00:01:00"}'


@pytest.mark.parametrize("make", [node, fat_node])
def test_made_nodes_lose_nothing_in_the_shape(make: Any) -> None:
    made = make("n", ("10.0.0.0/24",), {"a": "b"}, {"c": "d"}, "10.9.9.9")
    stored = decode(made, NODE)
    assert {key: made[key] for key in ("spec", "status")} == {key: stored[key] for key in ("spec", "status")}
    assert made["metadata"] == {key: stored["metadata"][key] for key in made["metadata"]}
