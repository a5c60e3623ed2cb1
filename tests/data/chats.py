"""Chat templates and messages for tests of conversations."""

CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
GENERATION = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}"
)
VISION = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}{%- else %}{%- for item in message.content %}"
    "{{- 'Picture: <|vision_start|><|image_pad|><|vision_end|>' if 'image' in item else item.text }}"
    "{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
STRICT = (
    "{%- for message in messages %}{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Roles must alternate') }}{%- endif %}{%- endfor %}" + CHATML
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a place, in °C",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "n": [1, 2.5, None, True]}}}
WITH_TOOLS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Zürich & Bern?"},
    {"role": "assistant", "content": "", "reasoning_content": "I need two calls.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "{'t': 3}"},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "3 °C and 4 °C.", "reasoning_content": "Done."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Welcome.", "reasoning_content": "\nPolite.\n"},
]
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
