"""The page: ``python app.py``, then http://127.0.0.1:7860. Gradio's own environment variables move it.

Also the entry of a Hugging Face Space and of a ModelScope studio, which look for ``demo`` or run this file.
"""

import os
import sys

# Gradio would answer with a traceback.
_port = os.environ.get("GRADIO_SERVER_PORT", "7860")
if not (_port.isdecimal() and 0 < int(_port) < 65536):
    sys.exit(f"错误：环境变量 GRADIO_SERVER_PORT 是 {_port!r}，不是端口号；请改成 1 到 65535 的整数，例如 7860。")
# Gradio reads this while it is imported: without it the server calls home.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# A studio shows what listens on all of the machine's addresses; a Space sets this itself.
if os.environ.get("MODELSCOPE_ENVIRONMENT") == "studio":
    os.environ.setdefault("GRADIO_SERVER_NAME", "0.0.0.0")
# Gradio asks its own address whether it is up; through a proxy it would never hear an answer.
for _name in ("NO_PROXY", "no_proxy"):
    os.environ[_name] = ",".join(filter(None, [os.environ.get(_name), "localhost", "127.0.0.1"]))

from studytiny.command import run_command  # noqa: E402
from studytiny.web import build_page, serve  # noqa: E402

demo = build_page()

if __name__ == "__main__":
    run_command(lambda: serve(demo))
