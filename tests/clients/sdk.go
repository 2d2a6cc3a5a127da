// A client of the AWS SDK for Go. `sdk-go credentials N` makes N clients one after another, each with a transport of its own
// that keeps its connections open, and prints how many have credentials. `sdk-go addresses` prints the links and addresses
// of the machine, as Go's standard library lists them.
package main

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/credentials"
	"github.com/aws/aws-sdk-go/aws/credentials/ec2rolecreds"
	"github.com/aws/aws-sdk-go/aws/ec2metadata"
	"github.com/aws/aws-sdk-go/aws/session"
)

func main() {
	if os.Args[1] == "addresses" {
		printAddresses()
		return
	}
	count, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	var kept []*credentials.Credentials
	failures := []string{}
	var slowest time.Duration
	for i := 0; i < count; i++ {
		// As the SDK's own client, which has this time limit and Go's default transport.
		client := &http.Client{
			Timeout:   time.Second,
			Transport: http.DefaultTransport.(*http.Transport).Clone(),
		}
		start := time.Now()
		config := aws.NewConfig().WithHTTPClient(client).WithMaxRetries(2)
		metadata := ec2metadata.New(session.Must(session.NewSession(config)))
		found := ec2rolecreds.NewCredentialsWithClient(metadata)
		if _, err := found.Get(); err != nil {
			failures = append(failures, strconv.Itoa(i)+": "+err.Error())
		}
		if took := time.Since(start); took > slowest {
			slowest = took
		}
		kept = append(kept, found)
	}
	output(map[string]interface{}{
		"credentials": len(kept) - len(failures),
		"failures":    failures,
		"slowest_ms":  slowest.Milliseconds(),
	})
}

func printAddresses() {
	links, err := net.Interfaces()
	if err != nil {
		panic(err)
	}
	names := []string{}
	for _, link := range links {
		names = append(names, link.Name)
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		panic(err)
	}
	texts := []string{}
	for _, address := range addresses {
		texts = append(texts, address.String())
	}
	output(map[string]interface{}{"links": names, "addresses": texts})
}

func output(value interface{}) {
	if err := json.NewEncoder(os.Stdout).Encode(value); err != nil {
		panic(err)
	}
}
