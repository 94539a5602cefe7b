"""Ask phi3v about a picture with the openai package; the answer is printed as it comes.

    SSL_CERT_FILE=server.crt PHI3V_KEY=phi3v_… python examples/chat.py "What is shown in this image?" picture.png

PHI3V_URL (https://localhost:8000) says where the server is; SSL_CERT_FILE is what proves it.
"""

import base64
import os
import sys

try:
    from openai import OpenAI, OpenAIError
except ImportError:
    sys.exit("chat.py needs the openai package: pip install openai")


def ask(question: str, pictures: list[str]) -> None:
    content = [{"type": "text", "text": question}]
    for path in pictures:
        data = base64.b64encode(open(path, "rb").read()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    client = OpenAI(
        base_url=os.environ.get("PHI3V_URL", "https://localhost:8000") + "/v1", api_key=os.environ["PHI3V_KEY"]
    )
    messages = [{"role": "user", "content": content}]
    for chunk in client.chat.completions.create(model="phi-3-vision", messages=messages, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) < 2 or "PHI3V_KEY" not in os.environ:
        sys.exit(__doc__)
    try:
        ask(sys.argv[1], sys.argv[2:])
    except (OpenAIError, OSError) as error:
        sys.exit(f"chat.py: {error}")
