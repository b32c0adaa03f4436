"""Which ids VMs get."""

from agentos.machine.identity import RANGE, IdRanges


def taken(ids: IdRanges, count: int) -> tuple[set[str], set[int | None]]:
    """The maps, and the owners of the user namespaces, of so many VMs at once."""
    slots = [ids.take_slot() for _ in range(count)]
    return {ids.map_line(slot) for slot in slots}, {ids.owner(slot) for slot in slots}


def test_each_vm_of_root_has_a_range_of_its_own() -> None:
    """And is owned by an id of that."""
    ids = IdRanges("root", 0x2000_0000, RANGE, 100)
    assert ids.on_disk(idmap=True) == (0, 1000)
    maps, owners = taken(ids, 100)
    assert (len(maps), len(owners)) == (100, 100)


def test_vms_that_share_a_range_have_owners_of_their_own() -> None:
    """To whom the kernel counts what is limited for each user: one VM cannot use it up for the next."""
    ids = IdRanges("root", 0x2000_0000, RANGE, 100)
    assert ids.on_disk(idmap=False) == (0x2000_0000, 0x2000_0000 + 1000)
    maps, owners = taken(ids, 100)
    assert maps == {f"0 {0x2000_0000} {RANGE}"}
    assert len(owners) == 100


def test_vms_of_an_ordinary_user_share_its_ids() -> None:
    """Of subordinate ones each VM is owned by another; of a single one nothing can be chosen."""
    ids = IdRanges("subuid", 1, 65_535, 65_535)
    ids.on_disk(idmap=False)
    maps, owners = taken(ids, 100)
    assert maps == {"0 1 65535"}
    assert len(owners) == 100
    assert all(owner is not None and 1 <= owner <= 65_535 for owner in owners)
    ids = IdRanges("single", 0, 1, 1)
    ids.on_disk(idmap=False)
    assert taken(ids, 3) == ({"1000 0 1"}, {None})
