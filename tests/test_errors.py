from unembed import errors


def test_a_message_stays_short_whatever_a_name_is():
    error = errors.DataError("a file", "x" * 1_000_000 + ".txt", "Correct the path")
    assert len(str(error)) < 1100
    assert "x … x" in str(error)
    assert "x.txt. Correct" in str(error)


def test_a_message_says_what_was_expected_what_was_found_and_what_to_do():
    error = errors.DataError("a text file", "nothing at x.txt", "Correct the path")
    assert str(error) == "expected a text file; found nothing at x.txt. Correct the path."
    assert (error.expected, error.actual, error.fix) == (
        "a text file",
        "nothing at x.txt",
        "Correct the path",
    )


def test_a_message_is_one_line_whatever_a_library_says():
    error = errors.DataError("rows", "Invalid data\n  ? ------\r\n  header failed.\n", "Copy it")
    assert str(error) == "expected rows; found Invalid data ? ------ header failed. Copy it."
