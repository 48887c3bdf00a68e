// nc carries its standard input and output to a target through a wstunnel server, as nc(1) does without one: the end of
// its input is the end of what the target reads, and the other way round. Links that are lost are replaced.
//
//	WSTUNNEL_URL=wss://TOKEN@HOST... nc [-library xnet|coder] [-v] HOST PORT
//
// HOST PORT may be one argument, a target as the protocol has them. Exit code 0: both ends were delivered.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"

	"clients/sockets"
	"clients/wstunnel"
)

func main() {
	log.SetFlags(log.Lmicroseconds)
	library := flag.String("library", "xnet", "the WebSocket library: xnet or coder")
	verbose := flag.Bool("v", false, "say what happens to links")
	flag.Parse()
	upgrade, found := sockets.Libraries[*library]
	if !found || flag.NArg() < 1 || flag.NArg() > 2 {
		flag.Usage()
		os.Exit(2)
	}
	target := flag.Arg(0)
	if flag.NArg() == 2 {
		target = net.JoinHostPort(flag.Arg(0), flag.Arg(1))
	}
	say := func(string, ...any) {}
	if *verbose {
		say = log.Printf
	}
	login, err := wstunnel.ParseLogin(os.Getenv("WSTUNNEL_URL"))
	check(err)
	signal.Ignore(syscall.SIGPIPE) // a write that fails is reset, after all else
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	session := wstunnel.NewSession(login, upgrade, say)
	err = session.Carry(ctx, target, os.Stdin, os.Stdout)
	session.Close()
	check(err)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "nc:", err)
		os.Exit(1)
	}
}
