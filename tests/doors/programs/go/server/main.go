// A server of grpc-go, whose methods do what their names say. Argument: the most calls at once (0: any number).
//
// It prints its port. At SIGTERM it stops gracefully: it announces the end, and finishes the calls that it has taken.

package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

type raw struct{}

func (raw) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), data...)
	return nil
}
func (raw) Name() string { return "raw" }

var hanging, cancelled atomic.Int64

func handle(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	var request []byte
	if err := stream.RecvMsg(&request); err != nil {
		return err
	}
	switch method[strings.LastIndex(method, "/")+1:] {
	case "echo":
		stream.SetHeader(metadata.Pairs("initial", "1"))
		stream.SetTrailer(metadata.Pairs("trailing-bin", "\x00\xff"))
		return stream.SendMsg(&request)
	case "refuse":
		stream.SetTrailer(metadata.Pairs("trailing", "2"))
		return status.Error(codes.FailedPrecondition, "not ñow")
	case "several":
		for range 3 {
			if err := stream.SendMsg(&request); err != nil {
				return err
			}
		}
		return nil
	case "wait":
		milliseconds, _ := strconv.Atoi(string(request))
		time.Sleep(time.Duration(milliseconds) * time.Millisecond)
		return stream.SendMsg(&request)
	case "hang":
		hanging.Add(1)
		<-stream.Context().Done()
		hanging.Add(-1)
		cancelled.Add(1)
		return stream.Context().Err()
	case "counts":
		answer := []byte(fmt.Sprintf("%d %d", hanging.Load(), cancelled.Load()))
		return stream.SendMsg(&answer)
	}
	return status.Error(codes.Unimplemented, "no such method")
}

func main() {
	most, err := strconv.Atoi(os.Args[1])
	if err != nil {
		panic(err)
	}
	options := []grpc.ServerOption{
		grpc.ForceServerCodec(raw{}),
		grpc.UnknownServiceHandler(handle),
		grpc.MaxRecvMsgSize(64 << 20),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Second, Timeout: time.Second}),
	}
	if most > 0 {
		options = append(options, grpc.MaxConcurrentStreams(uint32(most)))
	}
	server := grpc.NewServer(options...)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	ctx, _ := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	go func() {
		<-ctx.Done()
		server.GracefulStop()
	}()
	server.Serve(listener)
}
