"""The chat template that every export carries in its tokenizer_config.json (Jinja, as transformers and the serving
engines read it).

Equal to `internlm2.text.chat.render_text` for the same messages, tools and actions included; a test holds the two
together. It takes the released models' messages (role, content, optional `name`, actions spelled in the content) and
OpenAI's as well: `tools`, `tool_calls`, role `tool`, content in parts. As every chat template it trusts its input:
content that spells a marker becomes one. Where that matters, send ids.
"""

CHAT_TEMPLATE = r"""
{%- macro text_of(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content is iterable -%}{%- for part in content -%}{{ part['text'] }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro offered(tools) -%}
  {{- '<|im_start|>system name=<|plugin|>\n[' -}}
  {%- for tool in tools -%}
    {{- (tool['function'] if tool['function'] is defined else tool) | tojson -}}{{- '' if loop.last else ', ' -}}
  {%- endfor -%}
  {{- ']<|im_end|>\n' -}}
{%- endmacro -%}
{{- bos_token -}}
{%- set state = namespace(offer=tools is defined and tools) -%}
{%- for message in messages -%}
  {%- if state.offer and message['role'] != 'system' -%}
    {{- offered(tools) -}}{%- set state.offer = false -%}
  {%- endif -%}
  {%- set role = 'environment' if message['role'] == 'tool' else message['role'] -%}
  {%- set name = '<|plugin|>' if message['role'] == 'tool' else message['name'] -%}
  {%- if name in ['plugin', 'interpreter'] -%}{%- set name = '<|' ~ name ~ '|>' -%}{%- endif -%}
  {{- '<|im_start|>' ~ role ~ (' name=' ~ name if name else '') ~ '\n' -}}
  {{- text_of(message['content']) -}}
  {%- if message['tool_calls'] -%}
    {%- for tool_call in message['tool_calls'] -%}
      {%- set call = tool_call['function'] if tool_call['function'] is defined else tool_call -%}
      {%- set arguments = call['arguments'] -%}
      {{- '<|action_start|><|plugin|>\n{"name": ' ~ (call['name'] | tojson) ~ ', "parameters": ' -}}
      {{- (arguments if arguments is string else arguments | tojson) ~ '}<|action_end|>' -}}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if state.offer -%}{{- offered(tools) -}}{%- endif -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""".strip()
