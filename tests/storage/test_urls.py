"""URLs keep their slashes, and secrets in them are never printed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

from w2vscale.config import dump_config, load_config
from w2vscale.errors import UserError
from w2vscale.storage.urls import Url, place, scheme_of, shown


@pytest.mark.parametrize("text", ["s3://b/a//c.jsonl", "S3://b", "https://host/x?y=1", "gs://b/ä ö"])
def test_what_has_a_scheme_is_a_url(text: str) -> None:
    found = place(text)
    assert isinstance(found, Url) and found == text
    assert copy.deepcopy(found) == pickle.loads(pickle.dumps(found)) == found


@pytest.mark.parametrize("text", ["a", "/a/b", "s3:/b/a", "c:\\x", "://x", "a b://c", "simplecache::s3://b/x", ""])
def test_anything_else_is_a_path(text: str) -> None:
    assert place(text) == Path(text) and scheme_of(text) == ""


def test_its_parts() -> None:
    url = Url("s3://bucket/run/")
    assert url / "update_00000001" / "config.yaml" == "s3://bucket/run/update_00000001/config.yaml"
    assert (url.name, url.scheme) == ("run", "s3")


@pytest.mark.parametrize("text", ["s3://key:secret@bucket/x", "https://user@host/x"])
def test_a_url_with_a_password_is_refused_without_printing_it(text: str) -> None:
    with pytest.raises(UserError) as caught:
        place(text)
    assert "secret" not in str(caught.value) and "user@" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        load_config("base", [f"data.train={text}"])
    assert "secret" not in str(caught.value) and "data.train" in str(caught.value)


@pytest.mark.parametrize("text", ["s3://", "s3:///a", "s3://[x"])
def test_a_url_without_a_bucket_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="a URL has the form"):
        place(text)


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abcdef")
    text = "failed: 'https://u:pw@host/x?X-Amz-Signature=1234' with abcdef"
    assert shown(text) == "failed: 'https://***@host/x' with ***"


def test_settings_keep_urls(tmp_path: Path) -> None:
    settings = [
        "data.train=[s3://b//a.jsonl, b.jsonl]",
        "data.validation=gs://b/v.jsonl",
        "augment.noise=s3://b/n.jsonl",
    ]
    settings += ["trainer.init_from=s3://b/run", "checkpoint.store=s3://b/own", "data.url_schemes=[file,s3]"]
    config = load_config("base", settings)
    assert config.data.train == [Url("s3://b//a.jsonl"), Path("b.jsonl")]
    assert config.trainer.init_from == Url("s3://b/run")
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config
    assert isinstance(again.checkpoint.store, Url) and isinstance(again.data.train[1], Path)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("checkpoint.store=exp/store", "is not a URL such as"),
        ("data.url_schemes=[S3]", "data.url_schemes"),
        ("data.url_schemes=[s3://]", "data.url_schemes"),
    ],
)
def test_settings_that_are_refused(setting: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_config("base", [setting])
