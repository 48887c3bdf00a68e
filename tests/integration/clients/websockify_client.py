"""A plain endpoint's client on websockify's own WebSocket class.

websockify_client.py echo URL TOKEN SIZE     sends SIZE bytes and reads them back
websockify_client.py read URL TOKEN          reads to the end and prints what came
"""

import os
import sys
import threading

from websockify.websocket import WebSocket, WebSocketWantReadError

mode, url, token = sys.argv[1:4]
websocket = WebSocket()
websocket.connect(url, protocols=["binary", "bearer." + token])
assert websocket.protocol == "binary", websocket.protocol
back = bytearray()
sent = os.urandom(int(sys.argv[4])) if mode == "echo" else b""


def receive():
    """A message; None at the end."""
    while True:
        try:
            return websocket.recvmsg()
        except WebSocketWantReadError:
            pass  # a frame has not arrived whole


def send():
    for at in range(0, len(sent), 99991):
        websocket.sendmsg(sent[at : at + 99991])


sender = threading.Thread(target=send)
sender.start()
while mode == "read" or len(back) < len(sent):
    message = receive()
    if message is None:
        break
    back += message
sender.join()
if mode == "read":
    assert websocket.close_code == 1000, websocket.close_code
    print(back.decode())
else:
    websocket.close()
    print("true" if back == sent else "false")
