"""A conversation of two turns, and a chat template that marks what the assistant wrote."""

TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First\n  answer."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]
MARKED = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{% if message['role']"
    " == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{%"
    " else %}{{ message['content'] }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}{% if"
    " add_generation_prompt %}<|assistant|>\n{% endif %}"
)
