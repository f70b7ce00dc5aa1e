"""What may be a prompt; no tokenizer is read for it."""

from wanrt.errors import UsageError

MAX_PROMPT_BYTES = 65536


def check_prompt(text: str) -> None:
    """Raise UsageError for what no tokenizer should see. An empty prompt is legal."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UsageError(
            f"prompt has a lone surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}: it is not valid Unicode text; remove that character"
        ) from None
    if size > MAX_PROMPT_BYTES:
        raise UsageError(
            f"prompt is {size:,} bytes, the limit is {MAX_PROMPT_BYTES:,} (64 kB); shorten it "
            "(the model reads 512 tokens)"
        )
    if "\0" in text:
        raise UsageError(f"prompt has a NUL character at character {text.index(chr(0))}; remove it")
