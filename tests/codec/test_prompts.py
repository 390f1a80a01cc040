import numpy as np
import pytest

from vlafit.codec.prompts import FORMS, Prompt, clean, state_bins

# Made with the reference's own code: np.digitize(state, np.linspace(-1, 1, 256 + 1)[:-1]) - 1
STATE = np.array([-1.5, -1.0, -0.999, -0.5, 0.0, 0.5, 0.99, 1.0, 2.0])
BINS = [-1, 0, 0, 64, 128, 192, 254, 255, 255]


def test_an_instruction_is_cleaned_as_the_reference_does_it_case_kept():
    assert clean("  Pick_up the\nred_cup \n") == "Pick up the red cup"


def test_state_bins_are_those_of_the_reference_beyond_the_range_too():
    assert state_bins(STATE).tolist() == BINS


def test_every_bin_edge_belongs_to_the_bin_above():
    edges = np.linspace(-1, 1, 257)
    assert state_bins(edges).tolist() == [*range(256), 255]


def test_the_pi0_prompt_is_the_cleaned_text_then_a_newline_tokenised_apart():
    assert FORMS["pi0"].pieces(" open_the door", STATE) == ("open the door", "\n")


def test_the_pi05_prompt_is_the_references_string():
    assert FORMS["pi05"].pieces("open the door", STATE) == (
        "Task: open the door, State: -1 0 0 64 128 192 254 255 255;\nAction: ",
    )


def test_a_plain_prompt_is_the_instruction_untouched():
    assert FORMS["text"].pieces("open_the door ", STATE) == ("open_the door ",)


@pytest.mark.parametrize(
    ("prompt", "bos", "state"),
    [("pi0", True, False), ("pi05", True, True), ("text", False, False), ("line", False, False)],
)
def test_each_form_declares_its_bos_token_and_whether_it_holds_the_state(
    prompt: Prompt, bos: bool, state: bool
):
    form = FORMS[prompt]
    assert form.begins_with_bos is bos
    assert form.holds_state is state is (form.pieces("go", STATE) != form.pieces("go", -STATE))
