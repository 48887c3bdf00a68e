// A plain endpoint's client on Node's `ws`.
//
//   node node_ws.js echo URL TOKEN SIZE     sends SIZE bytes and reads them back
//   node node_ws.js read URL TOKEN          reads to the end and prints what came
'use strict';
const crypto = require('crypto');
const WebSocket = require('ws');

const [mode, url, token, size] = process.argv.slice(2);
const socket = new WebSocket(url, ['binary'], { headers: { Authorization: `Bearer ${token}` } });
const sent = crypto.randomBytes(Number(size || 0));
const back = [];
let length = 0;

socket.on('error', (error) => {
  console.error(error.message);
  process.exit(1);
});
socket.on('open', () => {
  if (socket.protocol !== 'binary') throw new Error(`the server chose ${socket.protocol}`);
  for (let at = 0; at < sent.length; at += 99991) socket.send(sent.subarray(at, at + 99991));
});
socket.on('message', (data, isBinary) => {
  if (!isBinary) throw new Error('a text message');
  back.push(data);
  length += data.length;
  if (mode === 'echo' && length === sent.length) socket.close(1000);
});
socket.on('close', (code) => {
  if (code !== 1000) throw new Error(`closed with ${code}`);
  console.log(mode === 'echo' ? sent.equals(Buffer.concat(back)) : Buffer.concat(back).toString());
});
