// A plain endpoint's client on golang.org/x/net/websocket, where a connection is an io.ReadWriteCloser.
//
//	xnet echo URL TOKEN SIZE     sends SIZE bytes and reads them back
//	xnet read URL TOKEN          reads to the end and prints what came
package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand"
	"os"
	"strconv"

	"golang.org/x/net/websocket"
)

func main() {
	config, err := websocket.NewConfig(os.Args[2], "http://localhost")
	check(err)
	config.Header.Set("Authorization", "Bearer "+os.Args[3])
	config.Protocol = []string{"binary"}
	connection, err := websocket.DialConfig(config)
	check(err)
	connection.PayloadType = websocket.BinaryFrame
	if os.Args[1] == "read" {
		data, err := io.ReadAll(connection)
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
