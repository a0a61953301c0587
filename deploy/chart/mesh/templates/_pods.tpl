{{- /* The common parts of the mesh's pods. */ -}}

{{- /* The pod's own settings; a dict with root, and optionally settings (router, a pool, etcd), account, token. */ -}}
{{- define "mesh.podSpec" -}}
{{- $values := .root.Values -}}
{{- $own := .settings | default dict -}}
serviceAccountName: {{ .account | default $own.serviceAccountName | default $values.serviceAccount.name }}
automountServiceAccountToken: {{ .token | default false }}
{{- /* Kubernetes would add a MESH_ROUTER_PORT and the like for each Service, and MESH_... are our own options. */}}
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  {{- with $values.podSecurity.runAsUser }}
  runAsUser: {{ int64 . }}
  {{- end }}
  {{- with $values.podSecurity.runAsGroup }}
  runAsGroup: {{ int64 . }}
  {{- end }}
  {{- with $values.podSecurity.fsGroup }}
  fsGroup: {{ int64 . }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- with $values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.priorityClassName | default $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $own.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $own.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Labels and annotations of a Job's pods; a dict with root and component. */ -}}
{{- define "mesh.jobPodMetadata" -}}
labels:
  {{- include "mesh.selector" . | nindent 2 }}
  {{- with .root.Values.jobs.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .root.Values.jobs.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* Spread over nodes and zones as far as there are any; a rollout counts only its own pods. */ -}}
{{- define "mesh.spread" -}}
topologySpreadConstraints:
  {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ $key }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels: {{- $.labels | nindent 8 }}
  {{- end }}
{{- end }}

{{- define "mesh.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{- /* The mesh's identity and the place of its registry: for every process of ours that uses etcd. */ -}}
{{- define "mesh.registryEnv" -}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: MESH_INSTALL_ID
  value: $(POD_NAMESPACE)/{{ .Release.Name }}
- name: MESH_ETCD_CONFIG
  value: /etc/mesh/etcd/etcd_connection
- name: MESH_BASE
  value: {{ .Values.etcd.base }}
- name: MESH_LOG_FORMAT
  value: {{ .Values.logFormat }}
- name: MESH_LOG_LEVEL
  value: {{ .Values.logLevel }}
{{- end }}

{{- /* For routers and runtime pods: the above, the pod, and TLS between them. */ -}}
{{- define "mesh.processEnv" -}}
- name: MESH_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{ include "mesh.registryEnv" . }}
{{- if .Values.internalTLS.enabled }}
- name: MESH_INTERNAL_TLS
  value: /etc/mesh/internal
{{- end }}
{{- end }}

{{- /* Mounted Secrets are whole folders, never single files by subPath: those would not follow a changed Secret. */ -}}
{{- define "mesh.etcdMount" -}}
- name: etcd-connection
  mountPath: /etc/mesh/etcd
  readOnly: true
{{- end }}

{{- /* The certificates are beside the connection of an embedded etcd, as an external one's are in its own Secret. */ -}}
{{- define "mesh.etcdVolume" -}}
- name: etcd-connection
  {{- if .Values.etcd.embedded }}
  projected:
    defaultMode: 288  # 0440
    sources:
      - secret:
          name: {{ include "mesh.etcdSecret" . }}
      {{- if .Values.internalTLS.enabled }}
      - secret:
          name: {{ include "mesh.internalSecret" . }}
          items: {{- include "mesh.certificateItems" . | nindent 12 }}
      {{- end }}
  {{- else }}
  secret:
    secretName: {{ include "mesh.etcdSecret" . }}
    defaultMode: 288  # 0440
  {{- end }}
{{- end }}

{{- define "mesh.internalMount" -}}
{{- if .Values.internalTLS.enabled }}
- name: internal
  mountPath: /etc/mesh/internal
  readOnly: true
{{- end }}
{{- end }}

{{- /* The items are named so that a pod waits until the Job has made them, and never sees the authority's own key. */ -}}
{{- define "mesh.internalVolume" -}}
{{- if .Values.internalTLS.enabled }}
- name: internal
  secret:
    secretName: {{ include "mesh.internalSecret" . }}
    defaultMode: 288  # 0440
    items: {{- include "mesh.certificateItems" . | nindent 6 }}
{{- end }}
{{- end }}

{{- define "mesh.certificateItems" -}}
- {key: ca.crt, path: ca.crt}
- {key: tls.crt, path: tls.crt}
- {key: tls.key, path: tls.key}
{{- end }}

{{- /* A pod's annotations, with their key; empty if there are none. A dict with root, port of the metrics, own. */ -}}
{{- define "mesh.annotations" -}}
{{- $all := dict -}}
{{- if .root.Values.monitoring.annotations -}}
{{- $all = dict "prometheus.io/scrape" "true" "prometheus.io/scheme" "http" "prometheus.io/path" "/metrics" "prometheus.io/port" (toString .port) -}}
{{- end -}}
{{- range $key, $value := .own -}}
{{- $_ := set $all $key $value -}}
{{- end -}}
{{- with $all -}}
annotations: {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end }}

{{- /* Probes of routers and runtime pods. /live shows a process that hangs, /ready one that can serve. */ -}}
{{- define "mesh.probes" -}}
startupProbe:  # two minutes for etcd to come up too
  httpGet: {path: /live, port: probe}
  periodSeconds: 1
  timeoutSeconds: 2
  failureThreshold: 120
readinessProbe:
  httpGet: {path: /ready, port: probe}
  periodSeconds: 3
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /live, port: probe}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}
