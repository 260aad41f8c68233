"""What `dtype: auto` means."""

import pytest

from internlm2.config.precision import cpu_multiplies_bf16, settled_dtype


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_bf16 avx512_vnni", True),
        ("flags\t\t: fpu sse2 avx2 avx512f amx_bf16", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu sse2 avx2 fma", False),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512bw", False),
        ("model name\t: avx512_bf16", False),
    ],
)
def test_processor_features(tmp_path, line, expected, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\n{line}\nbugs\t\t:\n", encoding="utf-8")
    assert cpu_multiplies_bf16(file) is expected


def test_other_systems_and_missing_files(tmp_path):
    assert cpu_multiplies_bf16(tmp_path / "none") is False


def test_auto_follows_the_device(monkeypatch):
    for there, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("internlm2.config.precision.cpu_multiplies_bf16", lambda there=there: there)
        assert settled_dtype("auto", "cpu") == expected
        assert settled_dtype("auto", "cuda") == "bf16"
        assert [settled_dtype(name, "cpu") for name in ("bf16", "fp32")] == ["bf16", "fp32"]
