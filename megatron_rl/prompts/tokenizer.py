"""Text to token ids and back, by a model directory's Hugging Face or SentencePiece files."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_rl.errors import InputError
from megatron_rl.files import read_json_object, refuse_irregular
from megatron_rl.prompts.rows import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json")
SENTENCEPIECE_FILE = "tokenizer.model"
# transformers reads config.json with the tokenizer, and has advice on ropes; ours are refused where
# it could matter (weights/families/hf_rope.py).
OF_ROPES = "transformers.modeling_rope_utils"
_SUFFIXES = (".json", ".jinja", ".txt", ".model")


class Tokenizer(Protocol):
    """A tokenizer as the loop uses it."""

    @property
    def name(self) -> str:
        """Kind and class, for the log."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may be larger, not smaller."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id, of added ones too; how a token is written depends on the tokenizer."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response; the first one, the tokenizer's own, ends gold responses."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Strings that encode() turns into control ids; no prompt of a data set may hold one."""

    @property
    def has_chat_template(self) -> bool: ...

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer itself puts in front of a text, BOS for one; often none."""

    @property
    def untold_bos(self) -> str | None:
        """The BOS that the model has, where nothing tells whether texts begin with it."""

    @property
    def chat_template(self) -> str:
        """Its source; "" where there is none."""

    def encode(self, text: str) -> list[int]:
        """The text's ids, with nothing in front or behind; control tokens become their ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text as encode() gives them, but faster."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def render_chat(self, chat: Chat, **arguments: Any) -> str:
        """The text of a chat up to where the response starts; arguments are the template's.

        Raises:
            InputError: the template fails, without a way out.
        """


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """The directory's tokenizer: Hugging Face files where there are any, else tokenizer.model.

    Its eos_ids are the union of what the tokenizer, config.json and generation_config.json name,
    in this order: models are released whose three files differ, and any of them may be sampled.
    """
    directory = Path(model_dir).expanduser()
    if not directory.is_dir():
        raise InputError(
            f"{directory}: there is no such model directory. Name a local directory with "
            f"{' or '.join(HUGGING_FACE_FILES)} or {SENTENCEPIECE_FILE}"
        )
    for file in directory.iterdir():
        if file.suffix in _SUFFIXES and not file.is_dir():
            refuse_irregular(file)  # transformers would wait for a FIFO
    if any((directory / file).is_file() for file in HUGGING_FACE_FILES):
        return HuggingFaceTokenizer(directory)
    if (directory / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(directory)
    raise InputError(
        f"{directory}: holds no tokenizer: none of {', '.join(HUGGING_FACE_FILES)}, "
        f"{SENTENCEPIECE_FILE}. Copy the files from where the weights come from"
    )


def local_tokenizer_dir(path: str) -> Path:
    """The directory itself, or the hub model's tokenizer files in the local cache, no weights."""
    if Path(path).expanduser().is_dir() or path.count("/") != 1:
        return Path(path)  # load_tokenizer reports what is wrong with it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{path!r}: neither a directory here nor a model the hub gave us "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Name a local directory with "
            "the tokenizer"
        ) from error


class HuggingFaceTokenizer:
    """A tokenizer by transformers' AutoTokenizer; Python code beside a model is never run."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        configured_eos = _configured_eos(directory)
        logging.getLogger(OF_ROPES).setLevel(logging.ERROR)
        try:
            loaded = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the Rust code raises this for a file that it cannot parse
            raise InputError(
                f"{directory}: transformers cannot load the tokenizer "
                f"({type(error).__name__}: {error}). A tokenizer that needs code of its own, or a "
                "file that is cut off or a git-lfs pointer, cannot be used"
            ) from error
        self._tokenizer: PreTrainedTokenizerBase = loaded
        self.vocabulary: Mapping[str, int] = loaded.get_vocab()
        self.vocab_size = 1 + max(self.vocabulary.values())
        self.name = f"huggingface:{type(loaded).__name__}"
        template: Any = loaded.chat_template or ""  # several by name where there is one for tools
        self.chat_template = (
            "\n".join(template.values()) if isinstance(template, dict) else template
        )
        self.has_chat_template = bool(template)
        special = {str(token) for token in loaded.added_tokens_decoder.values() if token.special}
        self.control_tokens = tuple(sorted(special | set(loaded.all_special_tokens)))
        self.eos_ids = _eos_ids(directory, loaded.eos_token_id, configured_eos, self.vocab_size)
        self.prefix_ids = _prefix_ids(loaded)
        self.untold_bos: str | None = None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: Any = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return list(encoded["input_ids"])

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return str(text)

    def render_chat(self, chat: Chat, **arguments: Any) -> str:
        from jinja2 import TemplateError

        turns = [{"role": role, "content": text} for role, text in chat]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True, **arguments
            )
        except (TemplateError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise InputError(
                f"{self._tokenizer.name_or_path}: the chat template fails on the turns "
                f"{', '.join(role for role, _ in chat)} ({type(error).__name__}: {error})"
            ) from error
        return str(text)


class SentencePieceTokenizer:
    """A tokenizer by a tokenizer.model alone. As in Hugging Face's, control pieces are encoded."""

    has_chat_template = False
    chat_template = ""
    prefix_ids: tuple[int, ...] = ()  # the file does not tell
    untold_bos: str | None = None

    def __init__(self, directory: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        file = directory / SENTENCEPIECE_FILE
        try:
            pieces = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{file}: is not a SentencePiece model ({error}). Copy it again; a file of a "
                "hundred bytes is a git-lfs pointer"
            ) from error
        self._pieces = pieces
        self.name = "sentencepiece"
        self.vocab_size = int(pieces.get_piece_size())
        self.vocabulary = {str(pieces.id_to_piece(k)): k for k in range(self.vocab_size)}
        self._control_ids = {
            str(pieces.id_to_piece(token)): token
            for token in range(self.vocab_size)
            if pieces.is_control(token)
        }
        self.control_tokens = tuple(sorted(self._control_ids))
        self._control = re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")
        if pieces.bos_id() >= 0 and _names_bos(directory):
            self.untold_bos = str(pieces.id_to_piece(pieces.bos_id()))
        own_eos = None if pieces.eos_id() < 0 else int(pieces.eos_id())
        self.eos_ids = _eos_ids(directory, own_eos, _configured_eos(directory), self.vocab_size)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for control in self._control.finditer(text):
            ids += self._plain(text[start : control.start()])
            ids.append(self._control_ids[control.group()])
            start = control.end()
        return ids + self._plain(text[start:])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        if skip_special:
            is_control, is_unknown = self._pieces.is_control, self._pieces.is_unknown
            ids = [token for token in ids if not (is_control(token) or is_unknown(token))]
            return str(self._pieces.decode(ids))
        # SentencePiece decodes control pieces to nothing, so they are put back between the rest.
        text, plain = "", list[int]()
        for token in ids:
            if self._pieces.is_control(token):
                text += str(self._pieces.decode(plain)) + str(self._pieces.id_to_piece(token))
                plain = []
            else:
                plain.append(token)
        return text + str(self._pieces.decode(plain))

    def render_chat(self, chat: Chat, **arguments: Any) -> str:
        raise InputError(
            "a SentencePiece tokenizer.model has no chat template. Set prompts.template, or leave "
            "it unset to use the prompt as it is"
        )

    def _plain(self, text: str) -> list[int]:
        return list(self._pieces.encode(text)) if text else []


def _names_bos(directory: Path) -> bool:
    """True where config.json names a BOS."""
    path = directory / "config.json"
    return path.is_file() and read_json_object(path).get("bos_token_id") is not None


def _prefix_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """What the tokenizer puts in front of a text, seen on one."""
    plain, whole = (
        list(tokenizer("1", add_special_tokens=adds)["input_ids"]) for adds in (False, True)
    )
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def _eos_ids(
    directory: Path, own: int | None, configured: list[int], vocab_size: int
) -> tuple[int, ...]:
    ids = tuple(dict.fromkeys(configured if own is None else [own, *configured]))
    if not ids:
        raise InputError(
            f"{directory}: neither the tokenizer nor config.json nor generation_config.json names "
            "an end-of-sequence token. Set eos_token_id in generation_config.json"
        )
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise InputError(
            f"{directory}: end-of-sequence ids {outside} lie outside the tokenizer's {vocab_size} "
            "tokens. The tokenizer is not this model's; copy the right files"
        )
    return ids


def _configured_eos(directory: Path) -> list[int]:
    """The ids in eos_token_id of config.json, then of generation_config.json, where they exist."""
    found: list[int] = []
    for file in (directory / "config.json", directory / "generation_config.json"):
        if not file.exists():
            continue
        value = read_json_object(file).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        if not all(entry is None or type(entry) is int for entry in values):
            raise InputError(
                f"{file}: eos_token_id={value!r}: must be a token id or a list of them"
            )
        found += [entry for entry in values if type(entry) is int]
    return found
