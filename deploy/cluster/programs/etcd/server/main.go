// etcd as its project releases it; a module of ours, because `go install` refuses modules that replace others.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
