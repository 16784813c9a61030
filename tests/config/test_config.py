"""Settings from YAML and overrides; every mistake is one line that names the nearest setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from w2vscale.config import (
    Config,
    OptimConfig,
    ParameterGroupConfig,
    Section,
    architecture,
    architecture_of,
    dump_config,
    load_config,
    preset_names,
)
from w2vscale.errors import UserError
from w2vscale.objectives import OBJECTIVES, all_settings, build_objective, load, resolve

# Values that are something else in YAML.
LITERAL = (
    *("my run #3", "#3", "x: y.jsonl", "x:", "0456", "off", "n", "true", "2.50", "1e3", "0x1f", "12:15", "~", "~/x"),
    *("2024-05-06", "'a'", '"b"', "{a}", "{a: 1}", "!x", "&x", "*x", "- x", "|", "a=b", "%", "[a", "a]", "null.pt"),
)


def error_of(source: str | Path, *overrides: str) -> str:
    """The message of an error, which is one line."""
    with pytest.raises(UserError) as caught:
        load(source, overrides)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def setting(key: str, *overrides: str) -> object:
    """The value of a setting in the preset tiny with overrides."""
    section, _, name = key.partition(".")
    return getattr(getattr(load_config("tiny", overrides), section), name)


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


class TestYaml:
    def test_a_section_with_all_settings_commented_out_keeps_those_of_the_preset(self, tmp_path: Path) -> None:
        assert load_config(yaml_file(tmp_path, "preset: tiny\noptim:\n#  lr: 1\n")) == load_config("tiny")

    def test_a_file_may_start_from_a_preset(self, tmp_path: Path) -> None:
        config = load_config(yaml_file(tmp_path, "preset: tiny\nmodel: {layers: 2}\noptim: {lr: 1.0e-3}\n"))
        tiny = load_config("tiny")
        assert (config.model.layers, config.optim.lr) == (2, 1e-3)
        assert config.model.dim == tiny.model.dim
        assert config.batch == tiny.batch

    def test_overrides_replace_the_file_and_later_ones_replace_earlier_ones(self, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, "optim: {lr: 1.0e-3, eps: 1.0e-7}\n")
        config = load_config(path, ["optim.lr=3e-4", "optim.lr=2e-4"])
        assert (config.optim.lr, config.optim.eps) == (2e-4, 1e-7)

    def test_a_list_replaces_the_list_of_the_file(self, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, "data: {train: [a.jsonl, b.jsonl]}\n")
        assert load_config(path, ["data.train=c.jsonl"]).data.train == [Path("c.jsonl")]


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "section", "key", "value"),
        [
            ("optim.lr=2e-3", "optim", "lr", 0.002),
            ("optim.lr = 1", "optim", "lr", 1.0),
            ("trainer.updates=32_000", "trainer", "updates", 32_000),
            ("optim.max_norm=null", "optim", "max_norm", None),
            ("model.conv_bias=yes", "model", "conv_bias", True),
            ("optim.betas=[0.8, 0.9]", "optim", "betas", (0.8, 0.9)),
            ("data.train=a=b.jsonl", "data", "train", [Path("a=b.jsonl")]),
            ("data.train=[a.jsonl, b.jsonl]", "data", "train", [Path("a.jsonl"), Path("b.jsonl")]),
            ("data.validation=[]", "data", "validation", []),
            ("schedule.kind=linear", "schedule", "kind", "linear"),
            ("optim={lr: 1.0e-5}", "optim", "lr", 1e-5),
        ],
    )
    def test_values_have_the_type_of_the_setting(self, override: str, section: str, key: str, value: object) -> None:
        found = getattr(getattr(load_config("base", [override]), section), key)
        assert found == value and type(found) is type(value)

    @pytest.mark.parametrize(
        ("override", "nearest"),
        [
            ("optim.lrr=1", "optim.lr"),
            ("batch.max_second=3", "batch.max_seconds"),
            ("data.trian=x", "data.train"),
            ("model.layer=3", "model.layers"),
            ("schedule.warmup=10", "schedule.warmup_updates"),
            ("trainer.warmup_updates=3", "schedule.warmup_updates"),
            ("trainer.lr=3", "optim.lr"),
            ("optim.learning_rate=3", "lr"),
            ("optm.lr=3", "optim"),
            ("lr=3", "optim.lr"),
            ("train=x.jsonl", "data.train"),
            ("optim.groups=[{pattern: x, lrscale: 2}]", "lr_scale"),
            ("mask_probability=0.5", "objective.mask_probability"),
            ("model.mask_probability=0.5", "objective.mask_probability"),
            ("model.negatives=3", "objective.negatives"),
        ],
    )
    def test_an_unknown_setting_names_the_nearest(self, override: str, nearest: str) -> None:
        message = error_of("base", override)
        assert override.partition("=")[0].partition("[")[0] in message
        assert nearest in message.partition(": unknown")[2] + message.partition(": no section")[2]

    @pytest.mark.parametrize(
        ("override", "named"),
        [
            ("optim.lr=fast", "optim.lr='fast'"),
            ("optim.lr=", "optim.lr=None"),
            ("optim.lr=[", "optim.lr='['"),
            ("optim.lr=true", "optim.lr: True"),
            ("optim.lr=yes", "optim.lr='yes'"),
            ("optim.lr=.nan", "optim.lr=nan"),
            ("optim.lr=.inf", "optim.lr=inf"),
            ("optim.lr=-1", "optim.lr=-1"),
            ("optim.lr.peak=3", "optim.lr={'peak': 3}"),
            ("trainer.updates=True", "trainer.updates: True"),
            ("trainer.updates=on", "trainer.updates='on'"),
            ("trainer.updates=2:45", "trainer.updates='2:45'"),
            ("optim.max_norm=1:00:00", "optim.max_norm='1:00:00'"),
            ("trainer.updates=2030-01-02", "trainer.updates='2030-01-02'"),
            ("optim.max_norm=off", "optim.max_norm='off'"),
            ("trainer.init_from=", "trainer.init_from: has no value; is a variable of the shell not set?"),
            ("data.train= ", "data.train: has no value"),
            ("mix.weights={sv: 1, no: 2, sv: 3}", "mix.weights: sv is given twice, in line 1"),
            ("optim.groups=[{pattern: a, pattern: b}]", "optim.groups: pattern is given twice, in line 1"),
            ("trainer.updates=1e3x", "trainer.updates='1e3x'"),
            ("precision.compute=fp16", "precision.compute: fp16 is not available: its largest number is 65,504"),
            ("precision.compute=fp16", "it needs loss scaling; use bf16, which has the range of fp32, or fp32 on GPUs"),
            ("model.layers=12.5", "model.layers=12.5"),
            ("model.layers=0", "model.layers=0"),
            ("model.conv_bias=maybe", "model.conv_bias='maybe'"),
            ("model.conv_layers=3", "model.conv_layers=3"),
            ("model.conv_layers=[[512, 10]]", "model.conv_layers.0"),
            ("schedule.kind=cosin", "schedule.kind='cosin'"),
            ("data.train=null", "data.train=None"),
            ("data.workers=-1", "data.workers=-1"),
            ("optim.betas=[0.9]", "optim.betas"),
            ("optim.groups=[{lr_scale: 2}]", "optim.groups.0.pattern"),
            ("optim.groups=[{pattern: '('}]", "optim.groups.0.pattern"),
            ("trainer.seed=-1", "trainer.seed=-1"),
            ("engine.name=zero", "engine.name='zero'"),
        ],
    )
    def test_a_wrong_value_is_reported_with_its_setting(self, override: str, named: str) -> None:
        assert named in error_of("base", override)

    @pytest.mark.parametrize("text", LITERAL)
    def test_a_path_or_text_is_taken_literally(self, text: str) -> None:
        for key in ("trainer.init_from", "data.train", "augment.noise", "trainer.best_metric"):
            assert setting(key, f"{key}={text}") in (text, [text], Path(text), [Path(text)])

    @pytest.mark.parametrize("text", LITERAL)
    def test_so_is_one_of_the_objective(self, text: str) -> None:
        kinds = {name: kind.Settings for name, kind in OBJECTIVES.items()}
        for key in ("objective.vocabulary", "objective.sentencepiece"):
            config = load_config("ctc_1h", [f"{key}={text}"], objectives=kinds)
            assert config.objective.model_dump()[key.partition(".")[2]] == text
            config = load_config("base", [f"{key}={text}", "objective.name=ctc"], objectives=kinds)
            assert config.objective.model_dump()[key.partition(".")[2]] == text

    @given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1))
    def test_any_text_is_a_path(self, text: str) -> None:
        if text.strip() and text.strip() != "null":
            assert setting("trainer.init_from", f"trainer.init_from={text}") == Path(text)
            if not text.strip().startswith("["):
                assert setting("data.validation", f"data.validation={text}") == [Path(text)]

    def test_a_list_of_paths_is_yaml_unless_there_is_a_file_of_this_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        key, text = "data.validation", "[0123, 'b #2.jsonl',no]"
        assert setting(key, f"{key}={text}") == [Path("0123"), Path("b #2.jsonl"), Path("no")]
        Path(text).touch()
        assert setting(key, f"{key}={text}") == [Path(text)]
        assert setting(key, f"{key}=[ab].jsonl") == [Path("[ab].jsonl")]
        assert setting("trainer.init_from", "trainer.init_from=[a, b]") == Path("[a, b]")
        for text, patterns in (("[^head, 'a: b']", ["^head", "a: b"]), ("^head #1: [ab]+", ["^head #1: [ab]+"])):
            assert setting("trainer.init_allow", f"trainer.init_allow={text}") == patterns

    def test_null_is_no_path(self) -> None:
        assert load_config("tiny", ["trainer.init_from=a", "trainer.init_from=null"]).trainer.init_from is None
        assert setting("trainer.init_from", "trainer.init_from=./null") == Path("null")

    def test_blanks_around_a_path_count_unless_there_is_one_before_the_sign(self) -> None:
        key = "trainer.init_from"
        for override, path in (("= a ", " a "), (" =  a b ", "a b"), (" = #1", "#1")):
            assert setting(key, f"{key}{override}") == Path(path)

    @pytest.mark.parametrize("override", ["optim.lr", "=3", ".lr=3", "optim.=3", "optim..lr=3", ""])
    def test_an_override_of_another_form_is_refused(self, override: str) -> None:
        assert error_of("base", override) == f"{override}: an override has the form section.key=value"

    @pytest.mark.parametrize(
        "overrides", [["optim.lr", "=", "3"], ["optim.lr", "=3"], ["optim.lr=", "3"], ["optim.lr =", "3"]]
    )
    def test_blanks_around_the_sign_are_named(self, overrides: list[str]) -> None:
        message = error_of("base", *overrides)
        assert message.endswith(": an override has the form section.key=value, without blanks around =")

    @pytest.mark.parametrize(
        "override", ["\udcff.lr=3", "optim.\udcff=3", "\udcff=3", "mix.weights.\udcff=3", "objective.\udcff=3"]
    )
    def test_a_name_that_is_not_utf_8_is_that_of_the_override(self, override: str) -> None:
        assert error_of("base", override) == f"override: {override!r}: the name of this setting is not UTF-8"

    def test_a_section_set_to_a_number_is_refused(self) -> None:
        assert "optim.key=value" in error_of("base", "optim=3")

    def test_the_message_says_whether_file_or_override_is_wrong(self, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, "optim: {lr: fast}\n")
        assert error_of(path) == error_of(path, "optim.eps=1e-8")
        assert error_of(path).startswith(f"{path}: optim.lr='fast'")
        assert error_of("base", "optim.lr=fast").startswith("override: optim.lr='fast'")
        assert load_config(path, ["optim.lr=1"]).optim.lr == 1.0

    def test_so_does_the_message_about_a_part_of_a_setting(self, tmp_path: Path) -> None:
        assert error_of("base", "mix.weights.sv=2").startswith("override: mix: weights need mix.by")
        path = yaml_file(tmp_path, "mix: {weights: {sv: 2}}\n")
        assert error_of(path, "mix.temperature=0").startswith(f"{path}: mix: weights need mix.by")

    def test_so_does_the_message_about_a_setting_of_the_objective(self, tmp_path: Path) -> None:
        unknown = "objective.negative: unknown setting; did you mean objective.negatives?"
        path = yaml_file(tmp_path, "objective: {negative: 3}\n")
        assert error_of(path) == error_of(path, "objective.negatives=3") == f"{path}: {unknown}"
        assert error_of("base", "objective.negative=3") == f"override: {unknown}"
        path = yaml_file(tmp_path, "objective: {negatives: many}\n")
        assert error_of(path).startswith(f"{path}: objective.negatives='many': ")
        assert load(path, ["objective.negatives=7"])[0].objective.model_dump()["negatives"] == 7
        path = yaml_file(tmp_path, "objective: {name: wav2vec}\n")
        assert error_of(path).startswith(f"{path}: objective.name='wav2vec': ")


class TestContradictions:
    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            (["model.heads=7"], "heads=7 does not divide dim=768"),
            (["model.positional_groups=7"], "positional_groups=7"),
            (["model.conv_norm_groups=100"], "conv_norm_groups=100"),
            (["objective.codebooks=3"], "codebooks=3"),
            (["objective.target_projection=false", "objective.projection_dim=128"], "projection_dim=128"),
            (["objective.gumbel_end=3"], "gumbel_end=3"),
            (["data.min_seconds=20"], "min_seconds=20"),
            (["batch.max_seconds=10"], "data.max_seconds=15.625"),
            (["batch.concat=65"], "batch.concat=65"),
            (["batch.concat=many"], "batch.concat: many is neither auto nor a whole number from 1 on"),
            (["batch.concat=0"], "batch.concat: 0 is neither auto nor"),
            (["batch.concat=true"], "batch.concat: True is neither auto nor"),
            (["batch.concat=yes"], "batch.concat: yes is neither auto nor"),
            (["engine.compile=maybe"], "engine.compile: maybe is none of auto, true and false"),
            (["batch.max_seconds=2e5"], "batch.max_seconds=200000: a micro-batch has at most 2^31 - 1 samples"),
            (["trainer.updates=100"], "schedule.warmup_updates=32000 is above trainer.updates=100"),
            (["schedule.stages=[0.1, 0.2, 0.3]"], "stages=(0.1, 0.2, 0.3)"),
            (["schedule.kind=tri_stage", "schedule.final_ratio=0"], "final_ratio=0"),
        ],
    )
    def test_the_error_names_both_settings(self, overrides: list[str], named: str) -> None:
        assert named in error_of("base", *overrides)


class TestSources:
    @pytest.mark.parametrize(
        ("name", "nearest"), [("bsae", "base"), ("base.yaml", "base"), ("conf/large-lv60.yaml", "large_lv60")]
    )
    def test_a_name_that_is_neither_file_nor_preset_names_the_nearest_preset(self, name: str, nearest: str) -> None:
        message = error_of(name)
        assert message.startswith(f"{name}: neither a file nor a preset; did you mean {nearest}?")
        assert all(preset in message for preset in preset_names())

    def test_the_error_names_a_missing_file_or_a_folder(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.yaml", tmp_path / "none.yaml" / "deeper.yaml"):
            assert error_of(path).startswith(f"{path}: neither a file nor a preset")
        assert error_of(tmp_path).startswith(f"{tmp_path}: has no config.yaml; give the folder of a run or checkpoint")

    def test_a_missing_path_names_the_nearest(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for folder in ("exp/large_2", "conf", "tinny"):
            Path(folder).mkdir(parents=True)
        Path("conf/swedish.yaml").touch()
        for source, nearest in (
            ("conf/swdish.yaml", "conf/swedish.yaml"),
            ("exp/lage_2", "exp/large_2"),
            ("cnof/swedish.yaml", "conf/swedish.yaml"),
            ("tiny_", "tiny"),
            ("exp/large_lv60", "large_lv60"),
        ):
            assert f"{source}: neither a file nor a preset; did you mean {nearest}?" in error_of(source)
        Path("exp/large_2/confg.yaml").touch()
        assert error_of("exp/large_2").endswith("; did you mean exp/large_2/confg.yaml?")

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
    def test_a_file_has_any_unicode_encoding(self, encoding: str, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_bytes("preset: tiny\ndata: {train: Töne/наука.jsonl}\n".encode(encoding))
        assert load_config(path).data.train == [Path("Töne/наука.jsonl")]
        path.write_bytes("preset: tiny\ndata: {train: Töne.jsonl}\n".encode("latin-1"))
        assert error_of(path).startswith(f"{path}: line 2 is not UTF-8 (byte 0xf6 at column 16)")

    @pytest.mark.parametrize("content", ["", "# nothing\n", "optim:\n  # lr: 1e-3\n"])
    def test_a_file_without_settings_is_refused(self, content: str, tmp_path: Path) -> None:
        """It was cut short, or is not the one that was meant: the defaults would be trained for hours."""
        path = yaml_file(tmp_path, content)
        assert error_of(path).startswith(f"{path}: has no settings; to start from a preset, write for example: preset:")

    def test_the_error_names_a_file_below_a_file(self, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, "") / "deeper.yaml"
        assert error_of(path).startswith(f"{path}: neither a file nor a preset")

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"RIFF\x24\x00\x00\x00WAVE", bytes(range(256))])
    def test_a_binary_file_is_refused(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_bytes(content)
        assert error_of(path).startswith(f"{path}: ")

    @pytest.mark.parametrize(
        "text",
        [
            "- a\n- b\n",
            "just text",
            "optim: [\n",
            "optim:\n\tlr: 1\n",
            "optim: 3\n",
            "optim: {1: 2}\n",
            "1: 2\n",
            "true: {lr: 3}\n",
            "null: 3\n",
            "? [a, b]\n: 3\n",
            "optim: {lr: *a}\n",
            "preset: tinny\n",
            "preset: [tiny]\n",
            "presets: tiny\n",
            "!!python/object/apply:os.system [true]\n",
        ],
    )
    def test_yaml_without_settings_is_refused_with_the_name_of_the_file(self, text: str, tmp_path: Path) -> None:
        path = yaml_file(tmp_path, text)
        assert error_of(path).startswith(f"{path}: ")

    def test_an_unknown_preset_in_a_file_names_the_nearest(self, tmp_path: Path) -> None:
        assert "did you mean tiny?" in error_of(yaml_file(tmp_path, "preset: tinny\n"))


class TestObjective:
    """Each objective has its own settings, which are checked when they are loaded, or else when it is built."""

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["objective.negative=3"], "objective.negative: unknown setting; did you mean objective.negatives?"),
            (
                ["objective.mask_prob=3"],
                "objective.mask_prob: unknown setting; did you mean objective.mask_",
            ),
            (["objective.negatives=many"], "objective.negatives='many': "),
            (["objective.negatives=0"], "objective.negatives=0: "),
            (["objective.negatives=true"], "objective.negatives: True is neither a number nor text"),
            (["objective.negatives=yes"], "objective.negatives='yes': "),
            (["objective.name=wav2vec"], "objective.name='wav2vec': Input should be 'wav2vec2'"),
            (["objective.name=ctc", "objective.negatives=3"], "objective.negatives: unknown setting"),
            (["objective.vocabulary=letters"], "objective.vocabulary: unknown setting (objective has: name, mask_"),
        ],
    )
    def test_a_mistake_is_one_line(self, overrides: list[str], message: str) -> None:
        assert error_of("base", *overrides).startswith(f"override: {message}")

    @pytest.mark.parametrize(
        "override",
        [
            *("model.dim=2000000", "model.ffn_dim=2000000", "model.positional_kernel=2000000"),
            *("model.conv_layers=[[512,2000000,1]]", "objective.codebook_entries=2000000"),
            *("objective.codevector_dim=2000000", "objective.projection_dim=2000000", "objective.negatives=2000000"),
        ],
    )
    def test_sizes_that_no_tensor_can_have_are_refused(self, override: str) -> None:
        assert "Input should be less than or equal to 1000000" in error_of("tiny", override)

    def test_settings_that_were_not_loaded_with_it_are_refused_too(self) -> None:
        for override, message in (
            ("objective.negative=3", "objective.negative: unknown setting; did you mean objective.negatives?"),
            ("objective.name=wav2vec", r"objective.name=wav2vec: unknown objective \(objectives: wav2vec2, ctc"),
        ):
            with pytest.raises(UserError, match=message):
                build_objective(load_config("base", [override]))

    def test_another_objective_starts_from_its_own_defaults(self, tmp_path: Path) -> None:
        for config in (
            load_config("base_prenorm", ["objective.name=ctc", "objective.vocabulary=letters"]),
            load_config(yaml_file(tmp_path, "preset: base_prenorm\nobjective: {name: ctc, vocabulary: letters}\n")),
        ):
            assert config.model == load_config("base_prenorm").model
            assert config.objective.model_dump() == {"name": "ctc", "vocabulary": "letters"}
            settings = resolve(config)[1].settings
            resolved = {"vocabulary": settings.vocabulary, "split": "longest"}
            assert dict(settings) == dict(OBJECTIVES["ctc"].Settings()) | resolved

    def test_the_same_objective_keeps_the_settings_below_it(self) -> None:
        config = load_config("base_prenorm", ["objective.name=wav2vec2", "objective.negatives=7"])
        assert config.objective.model_dump() == load_config("base_prenorm").objective.model_dump() | {"negatives": 7}

    def test_resolving_states_every_setting(self) -> None:
        config, objective = resolve(load_config("base"))
        assert config.objective.model_dump() == objective.settings.model_dump()
        assert set(config.objective.model_dump()) == set(OBJECTIVES["wav2vec2"].Settings.model_fields)


class TestTree:
    def test_all_settings_lists_every_key_with_type_and_default(self) -> None:
        tables = all_settings()
        for name, section in Config():
            if name != "objective":
                assert [key for key, *_ in tables[name]] == [f"{name}.{key}" for key in type(section).model_fields]
        for name, kind in OBJECTIVES.items():
            rows = tables[f"objective with objective.name={name}"]
            assert [key for key, *_ in rows] == [f"objective.{key}" for key in kind.Settings.model_fields]
            for key, _, default, _ in rows:
                override = [f"objective.name={name}", f"{key}={default}"]
                assert kind.Settings(**load_config("base", override).objective.model_dump()) == kind.Settings()
        for title, rows in tables.items():
            for key, kind, default, _ in rows:
                assert kind
                if not title.startswith("objective"):
                    assert load_config("base", [f"{key}={default}"]) == load_config("base")

    def test_every_setting_has_a_description(self) -> None:
        described = {key: text for rows in all_settings().values() for key, _, _, text in rows}
        described |= {key: field.description or "" for key, field in ParameterGroupConfig.model_fields.items()}
        assert len(described) > 100
        assert [key for key, text in described.items() if len(text.split()) < 2] == []

    def test_types_are_words_that_a_user_knows(self) -> None:
        kinds = {key: kind for rows in all_settings().values() for key, kind, _, _ in rows}
        assert {
            "optim.lr": "float",
            "optim.max_norm": "float or null",
            "model.layers": "int",
            "model.max_frames": "int or null",
            "model.conv_bias": "bool",
            "schedule.kind": "cosine or linear or tri_stage",
            "data.train": "list",
            "optim.betas": "list",
            "objective.negatives": "int",
            "objective.sentencepiece": "Path or null",
        }.items() <= kinds.items()

    def test_only_settings_marked_as_architecture_are_part_of_it(self) -> None:
        class Own(Section):
            width: int = architecture(8, "width of the layer")
            rate: float = Field(0.5, json_schema_extra={"unit": "Hz"})
            noted: float = Field(0.5, json_schema_extra={"architecture": False})

        assert architecture_of(Own()) == {"width": 8}

    def test_it_cannot_be_changed_after_it_was_checked(self) -> None:
        with pytest.raises(ValidationError):
            Config().optim.lr = 0.0  # type: ignore[misc]

    def test_defaults_are_checked_too(self) -> None:
        def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
            found = [field.annotation for field in model.model_fields.values()]
            return [kind for kind in found if isinstance(kind, type) and issubclass(kind, BaseModel)]

        assert all(section() == section.model_validate({}) for section in sections(Config))

    def test_the_dump_is_plain_yaml_without_tags(self) -> None:
        dumped = dump_config(load_config("base", ["data.train=a.jsonl"]))
        assert "!!" not in dumped
        assert list(yaml.safe_load(dumped)) == list(Config.model_fields)
        assert dump_config(OptimConfig()).startswith("lr: 0.0005")
