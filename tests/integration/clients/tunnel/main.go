// tunnel carries one stream after the other, on one link of wstunnel.1.
//
//	WSTUNNEL_URL=wss://TOKEN@HOST... tunnel LIBRARY SIZE TARGET...
//
// To each target it sends SIZE bytes and their end, reads to the end, and prints what happened: "echoed", "answered N",
// or "reset CODE". A target behind "abandon:" is reset from here as soon as anything came of it.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"clients/sockets"
	"clients/wstunnel"
)

// answer is what a target says. Its first bytes are waited for by cancel, if there is one.
type answer struct {
	bytes.Buffer
	cancel func()
}

func (a *answer) Write(data []byte) (int, error) {
	if a.cancel != nil {
		a.cancel()
	}
	return a.Buffer.Write(data)
}

func (a *answer) Close() error { return nil }

func carry(session *wstunnel.Session, target string, data []byte) string {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var back answer
	target, abandon := strings.CutPrefix(target, "abandon:")
	if abandon {
		back.cancel = cancel
	}
	err := session.Carry(ctx, target, bytes.NewReader(data), &back)
	if reset, ok := errors.AsType[*wstunnel.Reset](err); ok {
		return "reset " + reset.Code
	}
	check(err)
	if bytes.Equal(back.Bytes(), data) {
		return "echoed"
	}
	return fmt.Sprintf("answered %d", back.Len())
}

func main() {
	login, err := wstunnel.ParseLogin(os.Getenv("WSTUNNEL_URL"))
	check(err)
	size, err := strconv.Atoi(os.Args[2])
	check(err)
	data := make([]byte, size)
	rand.Read(data) // never fails
	session := wstunnel.NewSession(login, sockets.Libraries[os.Args[1]], func(string, ...any) {})
	defer session.Close()
	for _, target := range os.Args[3:] {
		fmt.Println(carry(session, target, data))
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "tunnel:", err)
		os.Exit(1)
	}
}
