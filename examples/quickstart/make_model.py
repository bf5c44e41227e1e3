"""Make the quickstart's model directory: a tokenizer trained on its data and random weights.

    python examples/quickstart/make_model.py --output OUTPUT

writes tokenizer.model (SentencePiece), the same tokenizer as Hugging Face files (tokenizer.json,
tokenizer_config.json), config.json, generation_config.json and model.safetensors: a Qwen2 of two
layers and about 140,000 parameters in float32. Every number 0..99 is one token, so that a step such
as 7+5=12 is six tokens and the arithmetic is learnable by so small a model. Takes seconds.
"""

import argparse
import io
import json
import sys
from pathlib import Path

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")  # ids 0..3
SYMBOLS = (*map(str, range(100)), "+", "-", "=", ",", "?", "\n", "\\boxed{", "}")
VOCAB_SIZE = len(CONTROL) + len(SYMBOLS)  # 112: splits evenly over 2, 4 or 8 ranks
MAX_POSITIONS = 256


def train_sentencepiece(data: Path) -> bytes:
    """The bytes of a tokenizer.model whose pieces are CONTROL, then SYMBOLS in this order."""
    import sentencepiece

    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(row["prompt"] + row["response"] for row in rows),
        model_writer=model,
        # The other kinds refuse a corpus that the symbols cover completely, as they do here.
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        user_defined_symbols=list(SYMBOLS),
        **{f"{piece.strip('<>')}_piece": piece for piece in CONTROL},
        **{f"{piece.strip('<>')}_id": index for index, piece in enumerate(CONTROL)},
        # Text goes in and comes out as it is: no blank in front, no Unicode folding.
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_hugging_face_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json with the pieces and ids of tokenizer.model.

    The symbols are added tokens, which are looked for before anything else. Nothing is left to the
    BPE below them, so it does not matter that AutoTokenizer rebuilds it as the Qwen2 class, with
    that class's own splitting of digits: for model_type qwen2 it trusts no other.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in CONTROL])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in SYMBOLS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        **{f"{piece.strip('<>')}_token": piece for piece in CONTROL},
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_model(directory: Path, seed: int) -> int:
    """config.json, generation_config.json and model.safetensors; returns the parameter count."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=CONTROL.index("<pad>"),
        eos_token_id=CONTROL.index("<eos>"),
        bos_token_id=CONTROL.index("<bos>"),
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(directory)
    return sum(param.numel() for param in model.parameters())


def make_model(directory: Path, data: Path, seed: int = 0) -> int:
    """Fill the directory; returns the parameter count."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(train_sentencepiece(data))
    write_hugging_face_tokenizer(directory)
    return write_model(directory, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data/train.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    num_params = make_model(arguments.output, arguments.data, arguments.seed)
    sys.stdout.write(f"{arguments.output}: {num_params:,} parameters, {VOCAB_SIZE} tokens\n")


if __name__ == "__main__":
    main()
