"""Ollama's Modelfile for an exported GGUF file."""

from __future__ import annotations

from milepost.text.chat_template import DEFAULT_SYSTEM, VICUNA_JINJA

MODELFILE = "Modelfile"

# Vicuna 1.1 in Go's template language: no space at the end of a prompt, the end-of-text token
# straight behind an answer.
_VICUNA = (
    '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }} '
    '{{ else if eq .Role "user" }}USER: {{ .Content }} ASSISTANT:'
    "{{ else }} {{ .Content }}%END%{{ end }}{{ end }}"
)


def modelfile(
    gguf_name: str, *, template: str | None, end_of_text: str, context_tokens: int
) -> str:
    """The text of a Modelfile.

    Args:
        gguf_name: of the file beside it.
        template: Jinja text of the model's chat template; None for a model that continues texts.
        end_of_text: the token that ends an answer.
        context_tokens: the longest context.
    """
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{gguf_name}"]
    if template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif template == VICUNA_JINJA:
        lines.append(f'TEMPLATE """{_VICUNA.replace("%END%", end_of_text)}"""')
        lines.append(f'SYSTEM """{DEFAULT_SYSTEM}"""')
    else:
        lines.append("# The chat template is in the GGUF file; Ollama takes it where it knows it.")
    lines.append(f'PARAMETER stop "{end_of_text}"')
    lines.append(f"PARAMETER num_ctx {context_tokens}")
    return "\n".join(lines) + "\n"
