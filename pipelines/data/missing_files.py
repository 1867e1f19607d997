"""What to do where a model comes without its tokenizer or processor: in the words of the caller."""

from residua.store.base.naming import named, names_flags


def to_give(argument: str, auto: str) -> str:
    """Return how the caller gives what a model lacks.

    Args:
        argument: The argument that takes it in Python; the command line loads it with the model.
        auto: The class of transformers that loads it.

    Example:
        >>> to_give("processor", "AutoProcessor")
        'pass processor=transformers.AutoProcessor.from_pretrained(...)'
    """
    if not names_flags():
        return f"pass {argument}=transformers.{auto}.from_pretrained(...)"
    return (
        f"save that of the model it was made from into the folder of {named('model')}, with "
        f"transformers.{auto}.from_pretrained(ORIGINAL).save_pretrained(FOLDER)"
    )
