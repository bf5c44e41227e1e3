"""A tokenizer with one id per character: enough where only ids, lengths and order matter."""


class CharTokenizer:
    name = "characters"
    vocab_size = 0x110000
    eos_ids = (3, 4)
    control_tokens = ("<eos>",)
    has_chat_template = False
    chat_template = ""
    prefix_ids = ()
    untold_bos = None

    def encode(self, text):
        return [ord(char) for char in text if char != "\x00"]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids, skip_special=True):
        return "".join(chr(token) for token in ids if not (skip_special and token in self.eos_ids))

    def render_chat(self, chat, **arguments):
        return "".join(f"[{role}]{text}" for role, text in chat) + "[assistant]"


class ChatCharTokenizer(CharTokenizer):
    has_chat_template = True
