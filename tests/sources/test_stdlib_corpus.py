"""The zero-download corpus: real, free of tests and tables, and divided so that held-out modules stay held out in
every part.
"""

import hashlib
import inspect
import textwrap

import pytest

from internlm2.data.encoding import split_hash
from internlm2.sources import stdlib_corpus


@pytest.fixture(scope="module")
def parts():
    return {part: list(stdlib_corpus.documents(part)) for part in ("code", "packages", "prose")}


def test_code_is_real_and_clean(parts):
    names = {document.file for document in parts["code"]}
    assert {"ast.py", "asyncio/base_events.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    assert "encodings/cp1252.py" not in names  # a table
    assert "pydoc_data/topics.py" not in names  # generated, and the source of `prose`
    assert sum(len(document.text) for document in parts["code"]) > 5_000_000
    contents = [hashlib.sha256(document.text.encode()).digest() for document in parts["code"]]
    assert len(set(contents)) == len(contents)


def test_packages_are_long_and_in_import_order(parts):
    documents = {document.file: document.text for document in parts["packages"]}
    assert all(len(text.encode()) >= stdlib_corpus.LONG_BYTES for text in documents.values())
    text = documents["json"]
    assert text.index("## json/scanner.py") < text.index("## json/decoder.py") < text.index("## json/__init__.py")
    assert sum(len(text) > 100_000 for text in documents.values()) >= 10


def test_prose(parts):
    assert any(document.file == "assignment" and "=" in document.text for document in parts["prose"])


def test_docstrings_hold_signatures():
    page = stdlib_corpus.documentation_page("textwrap.py", inspect.getsource(textwrap))
    assert page.startswith("# `textwrap`\n\nText wrapping and filling.")
    assert "## `textwrap.dedent(text)`\n\nRemove any common leading whitespace" in page
    assert "\n## `textwrap.TextWrapper.wrap(self, text)`\n\n" in page
    assert stdlib_corpus.documentation_page("x.py", "value = 1\n") == ""
    assert stdlib_corpus.documentation_page("x.py", "def broken(:\n") == ""


def held_out(document):
    return split_hash(document.split_key.encode()) < 0.04 * 2**64


def test_the_default_hold_out_is_the_same_in_all_parts_and_has_long_documents(parts):
    """conf/data/stdlib.yaml holds out 4 %: enough of every part to measure on, and the same modules in each."""
    for part, documents in parts.items():
        share = sum(len(document.text) for document in documents if held_out(document)) / sum(
            len(document.text) for document in documents
        )
        assert 0.01 < share < 0.10, part
    modules = {document.file.split("/")[0].removesuffix(".py") for document in parts["code"] if held_out(document)}
    long = {document.file.removesuffix(".py") for document in parts["packages"] if held_out(document)}
    assert "logging" in long
    assert long <= modules


def test_manifests_differ_by_part_and_repeat():
    manifests = [stdlib_corpus.manifest(part) for part in ("code", "packages", "prose", "docstrings")]
    assert len(set(manifests)) == 4
    assert manifests[0] == stdlib_corpus.manifest("code")
