"""Words of texts that nobody has cut into words."""

import pytest

from qa_dist.tasks.token_classification.words import words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ada's U.N. visit, at 10:30.", ["Ada", "'s", "U.N.", "visit", ",", "at", "10:30", "."]),
        ("Spanish-born (1.5 km), on 1996-08-22", ["Spanish-born", "(", "1.5", "km", ")", ",", "on", "1996-08-22"]),
        ("the 1st 30-year-old, 10%…", ["the", "1st", "30-year-old", ",", "10", "%", "…"]),
        ("O'Brien of AT&T can’t say 'yes'", ["O'Brien", "of", "AT&T", "can", "’t", "say", "'", "yes", "'"]),
        (
            "Dr. No and Sammy Davis Jr. of AC/DC and/or Acme Inc.",
            ["Dr.", "No", "and", "Sammy", "Davis", "Jr.", "of", "AC/DC", "and", "/", "or", "Acme", "Inc."],
        ),
        ("www.google.com, a.b", ["www.google.com", ",", "a", ".", "b"]),
        ("l'Oréal, D'Artagnan, o'clock", ["l'", "Oréal", ",", "D'Artagnan", ",", "o'clock"]),
        ("Wait... what?! -- ok", ["Wait", "...", "what", "?", "!", "--", "ok"]),
        ("@bob see https://a.b/c?d, #now", ["@bob", "see", "https://a.b/c?d", ",", "#now"]),
        ("a@b.org\n\t—ok", ["a@b.org", "—", "ok"]),
        ("東京は Ångström iPhone手机", ["東", "京", "は", "Ångström", "iPhone", "手", "机"]),
        ("กรุงเทพ", ["ก", "รุ", "ง", "เ", "ท", "พ"]),
        ("서울에서 हिन्दी مَدْرَسَة", ["서울에서", "हिन्दी", "مَدْرَسَة"]),
        ("Zu\u0308rich na\u00adive \u200bParis\u200e", ["Zu\u0308rich", "na\u00adive", "Paris"]),
        ("👍👍 👩\u200d🔬!", ["👍👍", "👩\u200d", "🔬", "!"]),
        ("\u200b\ufeff \u200e", []),
    ],
)
def test_words(text: str, words: list[str]):
    assert [text[start:end] for start, end in words_of(text)] == words


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part", ["手机", "a.", "a@", "ab.", "a", "1-", "x-", "d'", "https://!", ".!", "!", "\u0301", "a\u200b"]
)
def test_long_texts_without_blanks(part: str):
    """Each character is looked at a few times, however many there are; were it each time for each, this would hang."""
    text = part * (1_000_000 // len(part))
    ends = [0, *(end for _, end in words_of(text))]
    assert all(start >= before for (start, _), before in zip(words_of(text), ends, strict=False))
