"""Damaged image files become RGB images or errors that say nothing of the inside; `tests.soak.fuzz_images` has more."""

import pytest

from engine.image_decode import ImageError, decode_image
from tests.image_files import all_files
from tests.image_mutants import mutants
from tests.soak import fuzz_images

PIL_CANNOT = {"TIFF tiles > True"}


def test_damaged_files() -> None:
    report = fuzz_images.fuzz(1500, seed=20)
    assert not report.faults, report
    assert report.decoded + report.refused == 1500
    assert min(report.decoded, report.refused) > 300
    assert report.peak_mib < 150, report


def test_whole_files() -> None:
    """Else the damaged ones would show little."""
    files = all_files()
    assert {name for name, data in files.items() if not fuzz_images.fault_of(data)[0]} == PIL_CANNOT
    assert {name.split()[0] for name in files} == {"JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"}


def test_damage_is_the_same_each_time() -> None:
    files = all_files()
    first, again = (list(mutants(files, range(50, 80), seed=3)) for _ in range(2))
    assert first == again
    assert len({data for _, data in first}) > 25
    assert dict(mutants(files, range(60, 61), seed=3)).items() <= dict(first).items()
    assert dict(mutants(files, range(50, 80), seed=4)).keys().isdisjoint(dict(first))


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ImageError("cannot read <_io.BytesIO object at 0x7f00deadbeef>"), "tells"),
        (ImageError("/usr/lib/x is missing"), "tells"),
        (ImageError(""), "tells"),
        (MemoryError(), "raises"),
        (KeyboardInterrupt(), "raises"),
    ],
)
def test_faults_are_seen(error: BaseException, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes, *, max_pixels: int) -> None:
        raise error

    assert fuzz_images.fault_of(all_files()["PNG RGB"]) == (True, None)
    monkeypatch.setattr(fuzz_images, "decode_image", fail)
    decoded, found = fuzz_images.fault_of(b"")
    assert not decoded and found is not None and found.startswith(fault)


def test_limits_hold_for_every_format() -> None:
    files = all_files()
    for data in files.values():
        with pytest.raises(ImageError, match=r"limit is 0 pixels|could not be decoded"):
            decode_image(data, max_pixels=0)
    with pytest.raises(ImageError, match="61x51"):
        decode_image(files["GIF picture beyond its screen"], max_pixels=40 * 30)
