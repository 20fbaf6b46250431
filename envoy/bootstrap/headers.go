package bootstrap

import (
	"fmt"

	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	headersv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	earlyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

// stripRequest takes our headers off every request before anything else reads it. ext_proc cannot do it: when ext_proc
// fails, what it would have stripped stays.
func stripRequest() (*corev3.TypedExtensionConfig, error) {
	packed, err := anypb.New(&earlyv3.HeaderMutation{Mutations: []*mutationv3.HeaderMutation{removeOurs()}})
	if err != nil {
		return nil, fmt.Errorf("early header mutation: %w", err)
	}
	return &corev3.TypedExtensionConfig{Name: "knhk.strip", TypedConfig: packed}, nil
}

// receiptHeaders makes the response's x-knhk- headers ours alone: whatever the upstream sent under our prefix goes,
// then id and class come from the dynamic metadata that only ext_proc sets. It stands before ext_proc and so also
// covers our refusals and Envoy's own replies.
func receiptHeaders() (*hcmv3.HttpFilter, error) {
	return filter(filterHeaders, &headersv3.HeaderMutation{Mutations: &headersv3.Mutations{
		ResponseMutations: []*mutationv3.HeaderMutation{
			removeOurs(),
			fromMetadata(HeaderReceipt, MetadataReceipt),
			fromMetadata(HeaderClass, MetadataClass),
		},
		ResponseTrailersMutations: []*mutationv3.HeaderMutation{removeOurs()},
		RequestTrailersMutations:  []*mutationv3.HeaderMutation{removeOurs()},
	}})
}

// localReplies puts id and class on the replies that Envoy makes itself, for those that go past the filters: in full capture
// the upstream's response may be waiting for knhk when knhk dies or hangs, and Envoy then replies directly to the client. There is
// nothing to remove: such a reply has no header of the upstream. Where the filters have run too, the value is the same.
func localReplies() *hcmv3.LocalReplyConfig {
	return &hcmv3.LocalReplyConfig{Mappers: []*hcmv3.ResponseMapper{{
		// A mapper must have a filter: those that knhk has decided about.
		Filter: receiptFilter(&matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_PresentMatch{PresentMatch: true}}, false),
		HeadersToAdd: []*corev3.HeaderValueOption{
			metadataHeader(HeaderReceipt, MetadataReceipt),
			metadataHeader(HeaderClass, MetadataClass),
		},
	}}}
}

func removeOurs() *mutationv3.HeaderMutation {
	return &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_RemoveOnMatch_{
		RemoveOnMatch: &mutationv3.HeaderMutation_RemoveOnMatch{
			KeyMatcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: HeaderPrefix}},
		}}}
}

func fromMetadata(header, key string) *mutationv3.HeaderMutation {
	return &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_Append{Append: metadataHeader(header, key)}}
}

func metadataHeader(header, key string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{
		Header:       &corev3.HeaderValue{Key: header, Value: "%DYNAMIC_METADATA(" + MetadataNamespace + ":" + key + ")%"},
		AppendAction: corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD,
	}
}
