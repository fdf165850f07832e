"""Segments lie where the driver was seen to put them: new ranges downwards, gaps from the lowest up."""

from __future__ import annotations

from samegrad.measure.device_addresses import DeviceAddresses

MIB = 2**20


def without_the_range_left_behind() -> DeviceAddresses:
    addresses = DeviceAddresses()
    addresses.take(440 * MIB)
    return addresses


def test_ranges_go_down_in_steps_of_32_mebibytes_and_gaps_are_filled_first() -> None:
    # The order of one recorded history (an encoder for pictures, H200), in MiB below the first.
    sizes = (56, 56, 14, 14, 42, 14, 14, 14, 56)
    recorded = (0, -64, -96, -82, -160, -118, -192, -178, -256)
    addresses = without_the_range_left_behind()
    places = [addresses.take(size * MIB) for size in sizes]
    assert [(place - places[0]) // MIB for place in places] == list(recorded)


def test_what_is_given_back_is_a_gap_and_gaps_of_one_range_join() -> None:
    addresses = without_the_range_left_behind()
    first, second, third = (addresses.take(10 * MIB) for _ in range(3))
    addresses.take(64 * MIB)
    for place in (third, second):
        addresses.give_back(place)
    assert addresses.take(22 * MIB) == second
    assert first + 10 * MIB == second


def test_a_range_without_segments_is_a_hole_for_the_next_that_fits() -> None:
    addresses = without_the_range_left_behind()
    first, second = addresses.take(96 * MIB), addresses.take(32 * MIB)
    addresses.give_back(first)
    # At the upper end of the hole, and below all others what it does not hold.
    assert addresses.take(64 * MIB) == first + 32 * MIB
    assert addresses.take(64 * MIB) == second - 64 * MIB
    assert addresses.take(32 * MIB) == first


def test_the_range_left_behind_is_filled_from_below_and_stays() -> None:
    addresses = DeviceAddresses()
    first, second = addresses.take(200 * MIB), addresses.take(200 * MIB)
    assert second == first + 200 * MIB
    assert addresses.take(200 * MIB) < first
    addresses.give_back(first)
    addresses.give_back(second)
    assert addresses.take(64 * MIB) == first


def test_addresses_that_were_seen_come_first() -> None:
    addresses = DeviceAddresses(iter([0x7F00_0000_0000]))
    assert addresses.take(MIB) == 0x7F00_0000_0000
    addresses.give_back(0x7F00_0000_0000)
    assert addresses.take(MIB) != 0x7F00_0000_0000
