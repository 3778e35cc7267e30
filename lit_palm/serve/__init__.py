"""Talking to a checkpoint: `lit-palm chat` on the terminal, `lit-palm serve` for whoever speaks OpenAI's interface.

Both need nothing but a checkpoint that carries a tokeniser, whatever its network is. `chat` needs no other package;
`serve` needs the extra `lit-palm[serve]`.
"""
