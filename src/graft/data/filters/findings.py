"""The names of what may be odd about a row, and of the scripts that are told apart."""

from __future__ import annotations

from typing import Literal

FINDINGS = {
    "blank_answer": "the answer has no letter and no digit",
    "copied_prompt": "the answer repeats the prompt",
    "repetitive": "mostly one stretch of words again and again",
    "few_letters": "mostly signs, few letters and digits",
    "mojibake": "broken characters (U+FFFD, or UTF-8 that was read as another encoding)",
    "placeholder": "a placeholder or leftover markup where the answer should be",
    "other_script": "in another script than data.scripts",
}
"""What is looked for, by name."""

Finding = Literal["blank_answer", "copied_prompt", "repetitive", "few_letters", "mojibake", "placeholder"]
"""Findings that `data.drop` may name; another script has a field of its own."""

SCRIPTS = (
    "Latin",
    "Greek",
    "Cyrillic",
    "Armenian",
    "Hebrew",
    "Arabic",
    "Devanagari",
    "Bengali",
    "Tamil",
    "Telugu",
    "Thai",
    "Georgian",
    "Ethiopic",
    "Khmer",
    "Hangul",
    "Kana",
    "Han",
)
"""Scripts that are told apart, by their Unicode names; Kana is Hiragana and Katakana."""
