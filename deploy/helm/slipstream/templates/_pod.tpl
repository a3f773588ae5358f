{{/* The server's pod, the same in a Deployment and in a StatefulSet. */}}
{{- define "slipstream.podTemplate" -}}
metadata:
  labels:
    {{- include "slipstream.podLabels" . | nindent 4 }}
  annotations:
    # Changed settings start new pods.
    checksum/settings: {{ include (print $.Template.BasePath "/configmap-settings.yaml") . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "slipstream.podBasics" . | trim | nindent 2 }}
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.gpu.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- if or .Values.models.fetch.uri .Values.initContainers }}
  initContainers:
    {{- if .Values.models.fetch.uri }}
    {{- include "slipstream.fetchContainer" . | nindent 4 }}
    {{- end }}
    {{- with .Values.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    {{- include "slipstream.serverContainer" . | nindent 4 }}
  volumes:
    {{- if not (and .Values.cache.enabled .Values.models.fetch.uri) }}
    - name: models
      {{- include "slipstream.modelVolume" . | nindent 6 }}
    {{- end }}
    {{- include "slipstream.tmpVolume" . | nindent 4 }}
    {{- if .Values.models.fetch.uri }}
    {{- include "slipstream.scriptsVolume" . | nindent 4 }}
    {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - labelSelector:
        matchLabels:
          {{- include "slipstream.selectorLabels" $ | nindent 10 }}
      {{- toYaml . | nindent 6 }}
    {{- end }}
  {{- end }}
{{- end }}

{{- define "slipstream.serverContainer" -}}
- name: slipstream
  image: {{ include "slipstream.image" . | quote }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: ["serve", {{ .Values.models.mountPath | quote }}]
  envFrom:
    - configMapRef:
        name: {{ include "slipstream.suffixed" (list . "-settings") }}
  {{- if or .Values.env .Values.cache.enabled }}
  env:
    {{- if .Values.cache.enabled }}
    # Kernels that the driver compiles for this GPU outlive the pod.
    - name: CUDA_CACHE_PATH
      value: /cache/cuda
    - name: SLIPSTREAM_ENGINE_CACHE
      value: /cache/engines
    {{- end }}
    {{- with .Values.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  ports:
    - name: http
      containerPort: {{ .Values.settings.port }}
      protocol: TCP
  {{- if .Values.preStopSleepSeconds }}
  lifecycle:
    preStop:
      exec:
        command: ["sleep", {{ .Values.preStopSleepSeconds | quote }}]
  {{- end }}
  startupProbe:
    httpGet:
      path: /v2/health/ready
      port: http
    {{- toYaml .Values.probes.startup | nindent 4 }}
  readinessProbe:
    httpGet:
      path: /v2/health/ready
      port: http
    {{- toYaml .Values.probes.readiness | nindent 4 }}
  livenessProbe:
    httpGet:
      path: /v2/health/live
      port: http
    {{- toYaml .Values.probes.liveness | nindent 4 }}
  resources:
    {{- include "slipstream.resources" (list .Values.resources .Values.gpu) | nindent 4 }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts:
    {{- if and .Values.cache.enabled .Values.models.fetch.uri }}
    - name: cache
      mountPath: {{ .Values.models.mountPath }}
      subPath: models
      readOnly: true
    {{- else }}
    - name: models
      mountPath: {{ .Values.models.mountPath }}
      readOnly: true
      {{- with .Values.models.subPath }}
      subPath: {{ . }}
      {{- end }}
    {{- end }}
    - name: tmp
      mountPath: /tmp
    {{- if .Values.cache.enabled }}
    - name: cache
      mountPath: /cache
    {{- end }}
{{- end }}

{{- define "slipstream.fetchContainer" -}}
- name: fetch-models
  image: {{ .Values.models.fetch.image | quote }}
  imagePullPolicy: {{ .Values.models.fetch.pullPolicy }}
  command: ["python", "/scripts/fetch_models.py", {{ .Values.models.fetch.uri | quote }}, {{ .Values.models.mountPath | quote }}]
  {{- with .Values.models.fetch.secretName }}
  envFrom:
    - secretRef:
        name: {{ . }}
  {{- end }}
  {{- with .Values.models.fetch.env }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  resources:
    {{- toYaml .Values.models.fetch.resources | nindent 4 }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  volumeMounts:
    - name: {{ ternary "cache" "models" .Values.cache.enabled }}
      mountPath: {{ .Values.models.mountPath }}
      {{- if .Values.cache.enabled }}
      subPath: models
      {{- end }}
    - name: scripts
      mountPath: /scripts
      readOnly: true
    - name: tmp
      mountPath: /tmp
{{- end }}
