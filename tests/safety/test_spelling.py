"""Tricks of spelling that are undone, and words that stay what they are."""

# ruff: noqa: RUF001, RUF003 - letters of other alphabets are the point

from __future__ import annotations

import pytest

from flux2_studio.safety.spelling import fold_accents, spelling_variants


@pytest.mark.parametrize(
    "written",
    [
        "Lantern",
        "LANTERN",
        "l a n t e r n",
        "l.a.n.t.e.r.n",
        "l-a-n-t-e-r-n",
        "l_a_n_t_e_r_n",
        "lan.tern",
        "lan*tern",
        "l4nt3rn",
        "1antern",
        "lant€rn",
        "laaaantern",
        "lanternnnnn",
        "l\u200ban\u2060tern",
        "la\u00adntern",
        "ｌａｎｔｅｒｎ",
        "𝓵𝓪𝓷𝓽𝓮𝓻𝓷",
        "Ⓛⓐⓝⓣⓔⓡⓝ",
        "lаntеrn",  # Cyrillic а and е
        "lαntern",  # Greek α
        "l̶a̶n̶t̶e̶r̶n̶",
        "lántêrn",
        "l4nt\u200b\u0435rn",
    ],
)
def test_undone(written: str) -> None:
    assert "lantern" in spelling_variants(written)


def test_words_stay_words() -> None:
    assert spelling_variants("a man in the us army") == ["a man in the us army"]
    assert spelling_variants("1945, 12:30, 50 %") == ["1945, 12:30, 50 %"], "numbers are numbers"
    assert spelling_variants("голубое небо") == ["голубое небо"], "another language is not made Latin"
    assert spelling_variants("子供が走る") == ["子供が走る"]
    assert fold_accents("Niña, über, ЁЛКА, Ｆ") == "niña, uber, елка, f"
    assert "l a n  t e r n" not in spelling_variants("l a n  t e r n")[1:], "a gap of two blanks is one between words"
    assert "lan  tern" in spelling_variants("l a n  t e r n")
