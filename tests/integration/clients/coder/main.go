// A plain endpoint's client on github.com/coder/websocket, whose NetConn is a net.Conn.
//
//	coder echo URL TOKEN SIZE     sends SIZE bytes and reads them back
//	coder read URL TOKEN          reads to the end and prints what came
package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"os"
	"strconv"

	"github.com/coder/websocket"
)

func main() {
	ctx := context.Background()
	options := &websocket.DialOptions{
		HTTPHeader:   http.Header{"Authorization": {"Bearer " + os.Args[3]}},
		Subprotocols: []string{"binary"},
	}
	socket, _, err := websocket.Dial(ctx, os.Args[2], options)
	check(err)
	if socket.Subprotocol() != "binary" {
		check(fmt.Errorf("the server chose %q", socket.Subprotocol()))
	}
	connection := websocket.NetConn(ctx, socket, websocket.MessageBinary)
	if os.Args[1] == "read" {
		data, err := io.ReadAll(connection) // a Close 1000 is io.EOF to it, any other an error
		check(err)
		fmt.Printf("%s\n", data)
		return
	}
	size, err := strconv.Atoi(os.Args[4])
	check(err)
	sent := make([]byte, size)
	rand.New(rand.NewSource(1)).Read(sent)
	go func() {
		for at := 0; at < size; at += 99991 {
			_, err := connection.Write(sent[at:min(at+99991, size)])
			check(err)
		}
	}()
	back := make([]byte, size)
	_, err = io.ReadFull(connection, back)
	check(err)
	check(connection.Close())
	fmt.Println(sha256.Sum256(sent) == sha256.Sum256(back))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
