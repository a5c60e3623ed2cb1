"""The chat template of tokenizers that bring none, in jinja."""

CHATML = r"""
{%- set told = 1 if messages[0].role == 'system' else 0 %}
{%- if told or tools %}
    {{- '<|im_start|>system\n' }}
    {%- if told %}
        {{- messages[0].content }}
    {%- endif %}
    {%- if tools %}
        {{- ('\n\n' if told else '') + '# Tools\n\nThese functions can be called, one JSON signature a line:\n<tools>' }}
        {%- for tool in tools %}
            {{- '\n' + tool | tojson }}
        {%- endfor %}
        {{- '\n</tools>\n\nA call is a JSON object with the name and the arguments of a function:\n' }}
        {{- '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set state = namespace(question=messages | length) %}
{%- for message in messages if message.role == 'user' %}
    {%- set state.question = loop.length %}
{%- endfor %}
{%- set seen = namespace(questions=0) %}
{%- for message in messages[told:] %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if seen.questions == state.question and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
            {%- set content = content.lstrip('\n') %}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + function.name + '", "arguments": ' }}
            {{- function.arguments if function.arguments is string else function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- else %}
        {%- if message.role == 'user' %}
            {%- set seen.questions = seen.questions + 1 %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking else '') }}
{%- endif %}
"""
"""ChatML with thinking and tools, laid out as Qwen3 lays them out: thinking of turns before the last question is left out."""
