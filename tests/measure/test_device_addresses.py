"""Segments lie where the driver was seen to put them: new ranges downwards, gaps from the lowest up."""

from __future__ import annotations

from samegrad.measure.device_addresses import DeviceAddresses

MIB = 2**20


def test_ranges_go_down_in_steps_of_32_mebibytes_and_gaps_are_filled_first() -> None:
    # The order of one recorded history (an encoder for pictures, H200), in MiB below the first.
    sizes = (56, 56, 14, 14, 42, 14, 14, 14, 56)
    recorded = (0, -64, -96, -82, -160, -118, -192, -178, -256)
    addresses = DeviceAddresses()
    places = [addresses.take(size * MIB) for size in sizes]
    assert [(place - places[0]) // MIB for place in places] == list(recorded)


def test_what_is_given_back_is_a_gap_and_gaps_of_one_range_join() -> None:
    addresses = DeviceAddresses()
    first, second, third = (addresses.take(10 * MIB) for _ in range(3))
    addresses.take(64 * MIB)
    for place in (first, third, second):
        addresses.give_back(place)
    assert addresses.take(32 * MIB) == first


def test_addresses_that_were_seen_come_first() -> None:
    addresses = DeviceAddresses(iter([0x7F00_0000_0000]))
    assert addresses.take(MIB) == 0x7F00_0000_0000
    addresses.give_back(0x7F00_0000_0000)
    assert addresses.take(MIB) != 0x7F00_0000_0000
