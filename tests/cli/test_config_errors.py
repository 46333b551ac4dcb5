import json

import pytest

UNKNOWN_KEYS = [
    (["--trainer.max_step", "3"], "trainer.max_step: unknown key; did you mean trainer.max_steps"),
    (["--model.init_args.lrr", "3"], "model.init_args.lrr: unknown key; did you mean model.init_args.lr?"),
    (["--model.labell", "3"], "model.init_args.labell: unknown key; did you mean model.init_args.label?"),
    (["--model.init_args.shape.init_args.sid", "3"], "did you mean model.init_args.shape.init_args.side?"),
    (
        ["--model.init_args.extra.rnk", "3"],
        "model.init_args.extra.rnk: unknown key; did you mean model.init_args.extra.rank?",
    ),
    (["--model.init_args.optimizer.init_args.lrr", "1"], "did you mean model.init_args.optimizer.init_args.lr?"),
    (["--modell.x", "1"], "modell: unknown key; did you mean model?"),
    (["--max_steps", "3"], "max_steps: unknown key; did you mean trainer.max_steps?"),
    (["--lr", "3"], "lr: unknown key; did you mean model.init_args.lr?"),
    (["--zzz", "3"], "valid here: ckpt_path, data, data_dir, evaluation, model, name, output_dir"),
]
WRONG_CLASSES = [
    ("cli_fakes.Squar", "module cli_fakes has no 'Squar'; did you mean cli_fakes.Square?"),
    ("nowhere.Square", "no module 'nowhere' for nowhere.Square; did you mean cli_fakes.Square?"),
    ("Squar", "no Shape is called 'Squar'; did you mean cli_fakes.Square?"),
    ("cli_fakes.Line", "cli_fakes.Line is no Shape"),
    ("cli_fakes.Shape", "cli_fakes.Shape is abstract"),
]
WRONG_VALUES = [
    (["--trainer.max_steps", "abc"], "trainer.max_steps: got 'abc', expected int"),
    (["--model.init_args.lr", "fast"], "model.init_args.lr: got 'fast', expected float"),
    (["--model.init_args.mode", "fst"], "model.init_args.mode: got 'fst', expected one of fast, slow"),
    (["--model.init_args.extra.rank", "x"], "model.init_args.extra.rank: got 'x', expected int"),
    (["--data.init_args.count", "many"], "data.init_args.count: got 'many', expected int"),
    (["--trainer.precision", "bf17"], "bf16-mixed"),
    (["--trainer", "3"], "trainer: got '3', expected settings"),
    (["--overwrite", "perhaps"], "overwrite: got 'perhaps', expected bool"),
]


@pytest.mark.parametrize(("args", "said"), UNKNOWN_KEYS)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest(refused, args, said):
    assert said in refused(*args)


@pytest.mark.parametrize(("class_path", "said"), WRONG_CLASSES)
def test_a_wrong_class_is_named_with_the_nearest(refused, class_path, said):
    message = refused("--model.init_args.shape", class_path)
    assert f"model.init_args.shape.class_path: {said}" in message


@pytest.mark.parametrize(("args", "said"), WRONG_VALUES)
def test_a_wrong_value_is_named_with_what_is_expected(refused, args, said):
    assert said in refused(*args)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"modell": {}}, "over.yaml: modell: unknown key; did you mean model?"),
        ({"trainer": {"max_stepz": {}}}, "over.yaml: trainer.max_stepz: unknown key"),
        ({"model": {"init_args": {"shape": {"init_args": {"sides": {}}}}}}, "shape.init_args.sides: unknown key"),
        ({"trainer": None}, "over.yaml: trainer: got None, expected settings"),
        ({"model": {"init_args": [1]}}, "model.init_args: got [1], expected the settings of cli_fakes.Line by name"),
    ],
)
def test_what_the_parser_would_pass_over_in_silence_is_refused(refused, folder, tree, said):
    (folder / "over.yaml").write_text(json.dumps(tree))
    assert said in refused("--config", "over.yaml")


def test_errors_inside_mappings_and_lists_of_classes_name_the_element(refused):
    many = {"class_path": "cli_fakes.Many", "init_args": {"parts": {"a": {"class_path": "cli_fakes.Squre"}}}}
    message = refused("--model.init_args.shape", json.dumps(many))
    assert "model.init_args.shape.init_args.parts.a.class_path: module cli_fakes has no 'Squre'" in message
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpat": "x"}}]
    message = refused("--trainer.callbacks", json.dumps(callbacks))
    assert (
        "trainer.callbacks[0].init_args.dirpat: unknown key; did you mean trainer.callbacks[0].init_args.dirpath?"
        in message
    )


def test_a_missing_setting_is_named_with_its_path(refused, folder):
    (folder / "over.yaml").write_text('{"model": {"init_args": {"shape": {"class_path": "cli_fakes.Oblong"}}}}')
    message = refused("--config", "over.yaml")
    assert "model.init_args.shape.init_args.width: required by cli_fakes.Oblong, got nothing; expected float" in message


def test_all_mistakes_are_said_at_once(refused):
    message = refused("--trainer.max_step", "3", "--model.init_args.lrr", "1")
    assert "trainer.max_step:" in message
    assert "model.init_args.lrr:" in message


def test_the_class_of_the_model_is_checked_first(refused):
    assert "model.class_path: module cli_fakes has no 'Lime'; did you mean cli_fakes.Line?" in refused(
        "--model", "cli_fakes.Lime"
    )
    assert "data.class_path: cli_fakes.Line is no LightningDataModule" in refused("--data.class_path", "cli_fakes.Line")


def test_a_value_of_any_type_is_not_taken_for_the_name_of_a_class(refused, folder):
    (folder / "over.yaml").write_text(
        "model:\n  init_args:\n    shape: {class_path: cli_fakes.Labelled, init_args: {options: {api_key: hidden}}}"
    )
    message = refused("--config", "over.yaml", "--model.init_args.lr", "high")
    assert "model.init_args.lr: got 'high', expected float" in message
    assert "hidden" not in message


def test_our_own_classes_are_suggested_before_they_were_imported(refused):
    message = refused(
        "--model", "frpo.modules.policy_optimization.PolicyOptimization", "--model.reward", "frpo.rewards.Routr"
    )
    assert "did you mean Router?" in message


def test_question_marks_that_nobody_filled_in_are_refused(refused, folder):
    (folder / "over.yaml").write_text("model:\n  init_args:\n    label: ???")
    assert "over.yaml: model.init_args.label: '???' marks a value you must give" in refused("--config", "over.yaml")


def test_a_missing_environment_variable_is_named(refused, folder):
    (folder / "over.yaml").write_text("model: {init_args: {label: '${oc.env:FRPO_TEST_MISSING}'}}")
    message = refused("--config", "over.yaml")
    assert "model.init_args.label: the environment variable FRPO_TEST_MISSING is not set" in message
    assert "${oc.env:FRPO_TEST_MISSING,DEFAULT}" in message


def test_a_reference_to_nothing_is_answered_with_the_nearest(refused):
    message = refused("--model.init_args.label", "${output_dirr}")
    assert "model.init_args.label: ${output_dirr} names no setting; did you mean output_dir?" in message


def test_what_a_constructor_refuses_is_said_in_its_words_alone(refused):
    shape = {"class_path": "cli_fakes.Oblong", "init_args": {"width": -3.0}}
    message = refused("--model.init_args.shape", json.dumps(shape))
    assert message.splitlines()[1:] == ["  Oblong.width: got -3.0, expected > 0"]


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("gradient_clip_val", "1.0", "max_grad_norm"),
        ("gradient_clip_val", "0.0", "max_grad_norm"),
        ("accumulate_grad_batches", "2", "micro_batch_size"),
    ],
)
def test_settings_of_the_trainer_that_manual_optimisation_excludes_point_to_ours(refused, key, value, instead):
    message = refused(f"--trainer.{key}", value)
    assert f"trainer.{key}: got" in message
    assert f"write model.init_args.{instead} instead" in message


def test_the_trainers_own_folder_is_output_dir(refused):
    assert "trainer.default_root_dir: is output_dir" in refused("--trainer.default_root_dir", "x")


def test_an_abbreviated_option_is_unknown(refused):
    assert "trainer.max_ste: unknown key" in refused("--trainer.max_ste", "3")
    assert "output: unknown key; did you mean output_dir?" in refused("--output", "x")


def test_a_swapped_class_names_the_settings_it_drops_and_keeps(folder, frpo):
    (folder / "swap.yaml").write_text('{"model": {"init_args": {"shape": {"init_args": {"name": "mine"}}}}}')
    shape = "--model.init_args.shape"
    status, out, err = frpo(
        "fit",
        "--config",
        "base.yaml",
        "--config",
        "swap.yaml",
        shape,
        "cli_fakes.Oblong",
        f"{shape}.width",
        "2",
        "--print_config",
    )
    assert status == 0, err
    assert "changes the class from cli_fakes.Square to cli_fakes.Oblong: dropped side; kept name as set before" in err
    assert "name: mine" in out


def test_swapping_the_model_takes_the_new_class_own_defaults(folder, frpo):
    """The default model has a parameter ``optimizer`` too, with another default."""
    status, out, err = frpo("fit", "--config", "base.yaml", "--print_config")
    assert status == 0, err
    assert "class_path: torch.optim.SGD" in out
    assert "torch.optim.AdamW" not in out


def test_a_vague_place_for_a_class_asks_for_its_name(refused, folder):
    (folder / "over.yaml").write_text("model: {init_args: {shape: null}}")
    (folder / "more.yaml").write_text("model: {init_args: {shape: {init_args: {side: 1}}}}")
    message = refused("--config", "over.yaml", "--config", "more.yaml")
    assert "more.yaml: model.init_args.shape: no class_path is given, expected one of Shape" in message
